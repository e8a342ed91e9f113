"""Start an incremental load when there is something to load, and never when there is not."""

import json
import time

import dagster as dg

from deltaworks import operate
from deltaworks.errors import DeltaworksError
from resources.deltaworks_config import DeltaworksConfig

LOAD_EVERY_S = 30
"""How often to look. A load with its models and checks costs tens of seconds of processor time, so it takes what
has come together; search does not wait for it."""

RETRY_AFTER_S = 60.0
"""A load that failed is asked for again after this time, or as soon as there is more to load."""

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def log_ahead_sensor(source: str, *, job: dg.job, running: bool = True) -> dg.SensorDefinition:  # type: ignore[valid-type]
    """Watch one source: its log against the lake, and its database against the log where no service captures."""

    @dg.sensor(
        name=f"log_ahead_{source}",
        job=job,
        minimum_interval_seconds=LOAD_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Requests `load_{source}` when the change log of `{source}` is ahead of the lake, or when "
        "no capture service runs and the database has committed more.",
    )
    def log_ahead(context: dg.SensorEvaluationContext, deltaworks: DeltaworksConfig) -> dg.SensorResult | dg.SkipReason:
        try:
            behind = operate.behind(deltaworks.load(), source)
        except DeltaworksError as error:
            return dg.SkipReason(str(error))
        if not behind.is_behind:
            return dg.SkipReason(f"the lake is at the end of the log of {source!r}: {behind.place}")
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=f"load_{source}", statuses=_UNFINISHED))
        if unfinished:
            return dg.SkipReason(f"a load of {source!r} is running; it takes what there is when it starts")
        asked = json.loads(context.cursor) if context.cursor else {}
        if asked.get("place") == behind.place and time.time() - asked["at"] < RETRY_AFTER_S:
            return dg.SkipReason(f"already asked for {behind.place}; asking again after {RETRY_AFTER_S:.0f} s")
        return dg.SensorResult(
            run_requests=[dg.RunRequest(tags={"deltaworks/source": source, "deltaworks/to": behind.place})],
            cursor=json.dumps({"place": behind.place, "at": time.time()}),
        )

    return log_ahead
