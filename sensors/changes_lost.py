"""Raise what an audit finds, and start what repairs it."""

import time
from dataclasses import dataclass, replace

import dagster as dg
from pydantic import TypeAdapter

from assets.audited import loss_verdicts
from deltaworks import operate
from deltaworks.errors import DeltaworksError
from resources.deltaworks_config import DeltaworksConfig
from sensors.log_ahead import UNFINISHED

AUDIT_EVERY_S = 60
"""How often to audit; on an idle source that reads next to nothing."""

MOST_CHANGES = 2_000_000
"""More than a tick may read in its minute: a run audits them instead."""

RETRY_AFTER_S = 3_600.0
"""A repair that did not end its incidents is asked for again after this time, or when there is a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the sensor told of and asked for, as its cursor; `None` before its first look. Seconds since 1970."""

    told: tuple[str, ...] | None = None
    asked_for: tuple[str, ...] = ()
    asked_at: float = 0.0


_MEMORY = TypeAdapter(Memory)


def needs_repair(memory: Memory, open_incidents: tuple[str, ...], *, now: float) -> bool:
    """Whether a repair is due: for an incident that it was not asked for yet, or once more after a long time."""
    is_new = bool(set(open_incidents) - set(memory.asked_for))
    return bool(open_incidents) and (is_new or now - memory.asked_at >= RETRY_AFTER_S)


def changes_lost_sensor(
    source: str,
    *,
    audit_job: dg.job,  # type: ignore[valid-type]
    repair_job: dg.JobDefinition,
    running: bool = True,
) -> dg.SensorDefinition:
    """Watch the hops of one source: a new loss fails the check of its tables and asks for a repair."""

    @dg.sensor(
        name=f"changes_lost_{source}",
        jobs=[audit_job, repair_job],
        minimum_interval_seconds=AUDIT_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Audits what came to the hops of `{source}` since the last audit; requests `repair_{source}` when "
        "changes are lost.",
    )
    def changes_lost(
        context: dg.SensorEvaluationContext, deltaworks: DeltaworksConfig
    ) -> dg.SensorResult | dg.SkipReason:
        memory = _MEMORY.validate_json(context.cursor) if context.cursor else Memory()
        config = deltaworks.load()
        try:
            unseen = operate.unaudited(config, source)
            if unseen > MOST_CHANGES:
                return _asking(context, f"audit_{source}", memory, f"{unseen:,} changes are to be audited by a run")
            audit = operate.audit(config, source, is_since_last=True)
        except DeltaworksError as error:
            return dg.SkipReason(str(error))
        told = tuple(incident.id for incident in audit.open)
        events = loss_verdicts(source, config.source(source), audit) if told != memory.told else []
        memory, now = replace(memory, told=told), time.time()
        if not needs_repair(memory, told, now=now):
            return _result(memory, events, skip=audit.summary)
        asked = replace(memory, asked_for=told, asked_at=now)
        return _asking(context, f"repair_{source}", asked, audit.summary, events)

    return changes_lost


def _asking(
    context: dg.SensorEvaluationContext,
    job: str,
    memory: Memory,
    why: str,
    events: list[dg.AssetCheckEvaluation] | None = None,
) -> dg.SensorResult:
    if context.instance.get_runs_count(dg.RunsFilter(job_name=job, statuses=UNFINISHED)):
        # Not asked for: what it does not see is asked for at the next look.
        return _result(replace(memory, asked_for=()), events or [], skip=f"`{job}` is running; {why}")
    return dg.SensorResult(
        run_requests=[dg.RunRequest(job_name=job, tags={"deltaworks/why": why[:250]})],
        asset_events=events or [],
        cursor=_MEMORY.dump_json(memory).decode(),
    )


def _result(memory: Memory, events: list[dg.AssetCheckEvaluation], *, skip: str) -> dg.SensorResult:
    return dg.SensorResult(
        skip_reason=None if events else skip, asset_events=events, cursor=_MEMORY.dump_json(memory).decode()
    )
