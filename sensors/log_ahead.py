"""Start an incremental load when there is something to load, and never when there is not."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import dagster as dg
from pydantic import TypeAdapter

from deltaworks import operate
from deltaworks.errors import DeltaworksError
from deltaworks.operate import Behind
from resources.deltaworks_config import DeltaworksConfig

LOOK_EVERY_S = 5
"""How often to look; Dagster looks no more often."""

QUIET_S = 1.0
"""Nothing new for this long: what a burst of changes brought is complete, so it is loaded at once."""

LOAD_EVERY_S = 30.0
"""The least time between two loads, and the most that changes wait for a burst to end. A load with its models and
checks costs many seconds of processor time, so it takes what has come together; search does not wait for it."""

RETRY_AFTER_S = 60.0
"""A load that failed is asked for again after this time, or when there is more to load."""

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
"""A run that is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the sensor knows from its earlier looks, as its cursor; times are seconds since 1970."""

    behind_since: float | None = None
    asked_for: str | None = None
    asked_at: float = 0.0


_MEMORY = TypeAdapter(Memory)


def reason_to_wait(memory: Memory, place: str, *, is_quiet: Callable[[], bool], now: float) -> str | None:
    """Why a log that is ahead is not loaded yet; `None` when a load is due. `is_quiet` is asked only if it matters."""
    since_asked = now - memory.asked_at
    if memory.asked_for == place and since_asked < RETRY_AFTER_S:
        return f"already asked for {place}; asking again after {RETRY_AFTER_S:.0f} s"
    if since_asked < LOAD_EVERY_S:
        return f"the last load was asked for {since_asked:.0f} s ago; the next is due after {LOAD_EVERY_S:.0f} s"
    waited = now - (now if memory.behind_since is None else memory.behind_since)
    if waited < LOAD_EVERY_S and not is_quiet():
        return f"changes keep coming; loading when they pause, or {LOAD_EVERY_S - waited:.0f} s from now"
    return None


def log_ahead_sensor(source: str, *, job: dg.job, running: bool = True) -> dg.SensorDefinition:  # type: ignore[valid-type]
    """Watch one source: its log against the lake, and its database against the log where no service captures."""

    @dg.sensor(
        name=f"log_ahead_{source}",
        job=job,
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Requests `load_{source}` when the change log of `{source}` is ahead of the lake, or when "
        "no capture service runs and the database has committed more.",
    )
    def log_ahead(context: dg.SensorEvaluationContext, deltaworks: DeltaworksConfig) -> dg.SensorResult | dg.SkipReason:
        memory = _MEMORY.validate_json(context.cursor) if context.cursor else Memory()
        config = deltaworks.load()
        try:
            behind = operate.behind(config, source)
            waiting = _waiting(context, source, memory, behind, lambda: operate.behind(config, source))
        except DeltaworksError as error:
            return dg.SkipReason(str(error))
        now = time.time()
        if waiting is not None:
            since = (memory.behind_since or now) if behind.is_behind else None
            return _result(replace(memory, behind_since=since), skip_reason=waiting)
        tags = {"deltaworks/source": source, "deltaworks/to": behind.place}
        return _result(Memory(asked_for=behind.place, asked_at=now), run_requests=[dg.RunRequest(tags=tags)])

    return log_ahead


def _waiting(
    context: dg.SensorEvaluationContext, source: str, memory: Memory, behind: Behind, look: Callable[[], Behind]
) -> str | None:
    if not behind.is_behind:
        return f"the lake is at the end of the log of {source!r}: {behind.place}"
    if context.instance.get_runs_count(dg.RunsFilter(job_name=f"load_{source}", statuses=UNFINISHED)):
        return f"a load of {source!r} is running; it takes what there is when it starts"

    def is_quiet() -> bool:
        time.sleep(QUIET_S)
        return look().place == behind.place

    return reason_to_wait(memory, behind.place, is_quiet=is_quiet, now=time.time())


def _result(
    memory: Memory, *, skip_reason: str | None = None, run_requests: list[dg.RunRequest] | None = None
) -> dg.SensorResult:
    return dg.SensorResult(
        run_requests=run_requests, skip_reason=skip_reason, cursor=_MEMORY.dump_json(memory).decode()
    )
