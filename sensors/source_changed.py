"""Tell Dagster what happened to a source: schema changes as observations of the captured tables."""

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.errors import DeltaworksError
from resources.deltaworks_config import DeltaworksConfig

LOOK_EVERY_S = 30
"""How often to look. It reads headers of the log only, and only the new ones."""


def source_changed_sensor(source: str, *, running: bool = True) -> dg.SensorDefinition:
    """Watch the log of one source; asks for no run. The first look tells of what is there already."""

    @dg.sensor(
        name=f"source_changed_{source}",
        minimum_interval_seconds=LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Observes schema changes of `{source}` that capture has seen, each as an event of its table.",
    )
    def source_changed(
        context: dg.SensorEvaluationContext, deltaworks: DeltaworksConfig
    ) -> dg.SensorResult | dg.SkipReason:
        config = deltaworks.load()
        captured = {table: names.captured(source, table.short) for table in operate.tables_met(config, source)}
        after = int(context.cursor) if context.cursor else -1
        try:
            history = operate.history(config, source, after_sequence=after)
        except DeltaworksError as error:
            return dg.SkipReason(str(error))
        events = [
            dg.AssetObservation(
                captured[change.table],
                description=change.summary,
                metadata={
                    "position": str(change.position),
                    "what": ", ".join(change.what),
                    "old": dg.MetadataValue.json(dict(change.old or {})),
                    "new": dg.MetadataValue.json(dict(change.new or {})),
                    "dumped_again_because": change.needs_dump or "not needed",
                },
            )
            for change in history.schema_changes
            if change.table in captured
        ]
        if not events:
            context.update_cursor(str(history.sequence))
            return dg.SkipReason(f"no schema change of {source!r} up to group {history.sequence}")
        return dg.SensorResult(asset_events=events, cursor=str(history.sequence))

    return source_changed
