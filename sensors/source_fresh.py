"""Tell Dagster how fresh a source is, without a run: an idle source has no runs to tell it."""

import time
from dataclasses import dataclass

import dagster as dg
from pydantic import TypeAdapter

from assets.fresh import freshness_sentence, freshness_verdicts, is_fresh
from deltaworks import operate
from deltaworks.errors import DeltaworksError
from resources.deltaworks_config import DeltaworksConfig

LOOK_EVERY_S = 30
"""How often to look, which reads the log's newest headers and asks the source one short question."""

TELL_EVERY_S = 300.0
"""How often the same is told again: event logs grow, and a check that was told long ago looks like one of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the sensor told last, and when, as its cursor; `None` before its first look. Seconds since 1970."""

    told: bool | None = None
    told_at: float = 0.0


_MEMORY = TypeAdapter(Memory)


def is_worth_telling(memory: Memory, *, is_fresh: bool, now: float) -> bool:
    """Whether the verdict is another one, or was told long ago."""
    return memory.told != is_fresh or now - memory.told_at >= TELL_EVERY_S


def source_fresh_sensor(source: str, *, running: bool = True) -> dg.SensorDefinition:
    """Watch the canary of one source; asks for no run."""

    @dg.sensor(
        name=f"source_fresh_{source}",
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Tells the check `fresh` of the captured tables of `{source}` how old its newest canary is: "
        "when its service stands or goes on, and every five minutes.",
    )
    def source_fresh(
        context: dg.SensorEvaluationContext, deltaworks: DeltaworksConfig
    ) -> dg.SensorResult | dg.SkipReason:
        memory = _MEMORY.validate_json(context.cursor) if context.cursor else Memory()
        config = deltaworks.load()
        try:
            tables = operate.tables_met(config, source)
            status = operate.capture_status(config, source)
        except DeltaworksError as error:
            return dg.SkipReason(str(error))
        fresh, now = is_fresh(status), time.time()
        if not is_worth_telling(memory, is_fresh=fresh, now=now):
            return dg.SkipReason(freshness_sentence(status))
        return dg.SensorResult(
            asset_events=freshness_verdicts(source, tables, status),
            cursor=_MEMORY.dump_json(Memory(told=fresh, told_at=now)).decode(),
        )

    return source_fresh
