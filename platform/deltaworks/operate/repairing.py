"""Repairs what an audit found lost: the keys are dumped again, and every hop takes them as changes of now."""

from collections.abc import Sequence

from deltaworks.capture.dump import TextKey
from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.audit import Loss
from deltaworks.log.audit import key_text as text_of
from deltaworks.operate.dump import dump
from deltaworks.operate.incident import Incident, Incidents, IncidentState
from deltaworks.operate.lake import verify
from deltaworks.operate.log import capture
from deltaworks.operate.mending import is_of_a_gap, tell_incidents
from deltaworks.process.registry import load_app

KEYS_AT_ONCE = 10_000
"""Keys that a repair dumps; where more differ, their table is dumped whole."""


class RepairError(TerminalError):
    """An incident that no dump can mend."""


def repair(config: Config, source: str) -> Sequence[Incident]:
    """Dump the keys of every open incident of a source again; gives them as they ended.

    What was dumped is in the log when this returns; loads and apps take it from there as any change.

    Raises:
        RepairError: the keys of a document are not those of a table.
        DeltaworksError: whatever a dump raises.
    """
    tell_incidents(config, source)
    kept = Incidents.of(config, source)
    ended = [_repaired(config, source, kept, incident) for incident in kept.open()]
    tell_incidents(config, source)
    now = {incident.id: incident for incident in kept.all()}
    return [now[incident.id] for incident in ended]


def _repaired(config: Config, source: str, kept: Incidents, incident: Incident) -> Incident:
    if is_of_a_gap(config, source, incident):
        # Capture dumps what is lost with a gap by itself, and finds the rows that are gone.
        capture(config, source)
        return incident
    loss = incident.loss
    tables = loss.tables or tuple(loss.keys)
    kind, _, app = loss.hop.partition(" ")
    if kind == "sink" or (app and kind in {"log", "lake"}):
        wanted = _of_entities(config, app.partition("/")[0], loss)
    elif loss.hop == "log":
        wanted = _differing(config, source, tables)
    else:
        wanted = {table: loss.keys.get(table, ()) if loss.is_whole else () for table in tables}
    if not wanted:
        return kept.end(incident, IncidentState.SETTLED)
    dumps = []
    for table, keys in wanted.items():
        chosen = keys if len(keys) <= KEYS_AT_ONCE else ()
        dumps.append(dump(config, source, [table], keys=chosen).outcome.id)
    return kept.end(incident, IncidentState.REPAIRED, dumps=dumps)


def _differing(config: Config, source: str, tables: Sequence[str]) -> dict[str, tuple[TextKey, ...]]:
    """Keys that the log lacks are in nothing that was derived from it, so the source itself is asked."""
    verification = verify(config, source, sample_keys=KEYS_AT_ONCE + 1)
    short = {table.rpartition(".")[2]: table for table in tables}
    return {
        short.get(verdict.table, verdict.table): tuple(tuple(map(text_of, key)) for key in verdict.sample)
        for verdict in verification.tables
        if not verdict.is_equal and (not tables or verdict.table in short or verdict.table in tables)
    }


def _of_entities(config: Config, name: str, loss: Loss) -> dict[str, tuple[TextKey, ...]]:
    app = load_app(config, name)
    if app.document_key != app.key:
        raise RepairError(
            f"cannot repair {loss.hop}: documents of app {name!r} have the key {app.document_key!r}, its rows "
            f"{app.key!r}; run `deltaworks replay {name} --into same`"
        )
    keys = tuple(key for keys in loss.keys.values() for key in keys)
    return {str(app.entity.name): keys if loss.is_whole else ()}
