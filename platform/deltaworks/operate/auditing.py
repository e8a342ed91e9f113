"""The audit: does what went in come out, hop by hop, and what mends it where it does not.

reader ─► log ─► lake              sum up windows, compare, name keys by the sketch
            └──► app ─► sinks      what left by key and version, against what each sink says it holds
                          └─► log of the app ─► lake
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.capture.dump import TextKey
from deltaworks.capture.proof import Window, WindowSet
from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.audit import HopAudit, Loss, audit_hop, audit_log
from deltaworks.log.audit import key_text as text_of
from deltaworks.log.change_log import LogReader
from deltaworks.log.registry import open_reader as open_log
from deltaworks.log.taken import Taken
from deltaworks.operate.audit_mark import (
    NOTHING_AUDITED,
    AuditMark,
    HopMark,
    chain_at,
    fresh_spans,
    log_mark,
    log_start,
    span_mark,
)
from deltaworks.operate.dump import dump
from deltaworks.operate.incident import Incident, Incidents, IncidentState
from deltaworks.operate.lake import open_lake_if_there, verify
from deltaworks.position import Lsn
from deltaworks.process.app import App
from deltaworks.process.ledger import LedgerReader, LeftDocument, Stood
from deltaworks.process.registry import load_app
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.sink import SinkSpec, StoredVersion, key_text, open_reader
from deltaworks.store.load import loaded_spans

KEYS_AT_ONCE = 10_000
"""Keys that a repair dumps; where more differ, their table is dumped whole."""

logger = structlog.get_logger(__name__)


class RepairError(TerminalError):
    """An incident that no dump can mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkAudit:
    """What a sink holds of what left for it. `is_readable` is `False` where it gives nothing back, and where several
    processes share the app, so that none knows all that left.
    """

    app: str
    sink: str
    documents: int = 0
    is_readable: bool = True
    loss: Loss | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """One look at a source, its hops, and the entities of its apps; `found` are incidents that are new.

    `mended` has by hop the windows that lack what was lost and repaired, as they do for ever.
    """

    source: str
    position: Lsn
    hops: Sequence[HopAudit]
    sinks: Sequence[SinkAudit] = ()
    entities: Mapping[str, Sequence[Stood]] = field(default_factory=dict)
    found: Sequence[Incident] = ()
    open: Sequence[Incident] = ()
    mended: Mapping[str, WindowSet] = field(default_factory=dict)

    @property
    def is_balanced(self) -> bool:
        """Whether nothing is lost that is not repaired."""
        return not self.open

    @property
    def summary(self) -> str:
        """One line for people; no keys."""
        if self.is_balanced:
            return f"{self.source}: nothing is lost up to {self.position}"
        return f"{self.source}: " + "; ".join(incident.summary for incident in self.open)

    def blamed_on(self, table: str, *, captured: Collection[str]) -> Sequence[Incident]:
        """The open incidents of a captured table; one that names none of those that are `captured` is of all."""
        return [
            incident
            for incident in self.open
            if table in incident.loss.tables or not set(incident.loss.tables).intersection(captured)
        ]

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The sheet as JSON values; no keys."""
        return {
            "source": self.source,
            "position": str(self.position),
            "is_balanced": self.is_balanced,
            "hops": [
                {
                    "hop": hop.hop,
                    "up_to_sequence": hop.up_to,
                    "in": hop.handed.to_json(),
                    "out": hop.arrived.to_json(),
                    "repaired": self.mended.get(hop.hop, WindowSet()).to_json(),
                    "waiting": dict(hop.waiting.counts),
                    "unproven_groups": hop.unproven,
                    "retired_spans": hop.retired,
                }
                for hop in self.hops
            ],
            "sinks": [
                {
                    "app": each.app,
                    "sink": each.sink,
                    "documents": each.documents,
                    "is_readable": each.is_readable,
                    "missing": sum(map(len, each.loss.keys.values())) if each.loss else 0,
                }
                for each in self.sinks
            ],
            "entities": {
                app: [
                    {
                        "minute": stood.minute,
                        "left": stood.left,
                        "filtered": stood.filtered,
                        "gone": stood.gone,
                        "waiting": stood.waiting,
                        "held": stood.held,
                        "dead": stood.dead,
                    }
                    for stood in standing
                ]
                for app, standing in self.entities.items()
            },
            "open_incidents": [incident.summary for incident in self.open],
        }


def audit(config: Config, source: str, *, is_since_last: bool = False) -> Audit:
    """Compare every hop of a source and of its apps with the one before; what is lost becomes an incident.

    Reads the whole log, or with `is_since_last` what neither log nor hops had at the last audit: on an idle source
    that is next to nothing, and a sink that was sent nothing since is not read. Nothing is written but incidents and
    how far this went. Services may go on meanwhile.

    Raises:
        CorruptLogError: a group of a log cannot be read at all.
    """
    incidents = Incidents.of(config, source)
    mark = AuditMark.read(config, source) if is_since_last else AuditMark()
    reader = open_log(config, source)
    end = reader.end()
    apps = {name: load_app(config, name) for name, app in config.apps.items() if app.source == source}
    look = _Look(mark=mark, known=incidents.known())
    look.at_log(reader, hop="log")
    entities: dict[str, Sequence[Stood]] = {}
    with open_lake_if_there(config) as lake:
        if lake is not None:
            look.at_hop(reader, loaded_spans(lake, source), hop="lake")
        for name, app in apps.items():
            tables = {str(table.name) for table in app.tables}
            with LedgerReader(config.app_folder(name) / STATE_FILE) as ledger:
                look.at_hop(reader, ledger.spans(), hop=f"app {name}", tables=tables)
                if config.app(name).shares is None:
                    entities[name] = ledger.stood(app.entity.name.short)
            own = open_log(config, name)
            if own.end().sequence >= 0:
                look.at_log(own, hop=f"log {name}")
                if lake is not None:
                    look.at_hop(own, loaded_spans(lake, name), hop=f"lake {name}")
    sinks = [look.at_sink(config, name, app, spec) for name, app in apps.items() for spec in app.sinks]
    losses = [loss for hop_audit in look.hops for loss in hop_audit.losses]
    losses += [each.loss for each in sinks if each.loss is not None]
    faults.reach("audit.before_incidents")
    found = incidents.add(losses)
    for incident in found:
        logger.error("changes are lost", source=source, hop=incident.loss.hop, incident=incident.id)
    # Only now, because what is behind the mark is not looked at again: its losses have to be incidents.
    AuditMark(offset=end.offset, hops=look.hop_marks, sinks=look.sink_marks).save(config, source)
    return Audit(
        source=source,
        position=end.position,
        hops=look.hops,
        sinks=sinks,
        entities=entities,
        found=found,
        open=incidents.open(),
        mended=incidents.mended(),
    )


@dataclass(slots=True, kw_only=True)
class _Look:
    """One audit on its way through the hops: from where each was audited, and how far each is now."""

    mark: AuditMark
    known: Mapping[str, Mapping[int, WindowSet]]
    hops: list[HopAudit] = field(default_factory=list)
    hop_marks: dict[str, HopMark] = field(default_factory=dict)
    sink_marks: dict[str, str] = field(default_factory=dict)

    def at_log(self, reader: LogReader, *, hop: str) -> None:
        after, chain = log_start(reader, self.mark.hops.get(hop, NOTHING_AUDITED))
        found = audit_log(reader, hop=hop, after=after, chain=chain, known=self.known.get(hop))
        self.hops.append(found)
        chain = chain if found.up_to == after else chain_at(reader, found.up_to)
        self.hop_marks[hop] = log_mark(found.up_to, chain)

    def at_hop(
        self, reader: LogReader, spans: Sequence[Taken], *, hop: str, tables: Collection[str] | None = None
    ) -> None:
        fresh = fresh_spans(spans, self.mark.hops.get(hop, NOTHING_AUDITED))
        done = len(spans) - len(fresh)
        after = spans[done - 1].up_to if done else -1
        self.hops.append(audit_hop(reader, fresh, hop=hop, after=after, tables=tables, known=self.known.get(hop)))
        # The newest span may still grow.
        self.hop_marks[hop] = span_mark(spans[:-1])

    def at_sink(self, config: Config, name: str, app: App, spec: SinkSpec) -> SinkAudit:
        sink = f"{name}/{type(spec).__name__} {spec.name}"
        with LedgerReader(config.app_folder(name) / STATE_FILE) as ledger:
            left = ledger.left()
        self.sink_marks[sink] = left.digest
        is_whole = config.app(name).shares is None
        if self.mark.sinks.get(sink) == left.digest and _is_comparable(spec) and is_whole:
            return SinkAudit(app=name, sink=spec.name, documents=left.documents)
        return _audit_sink(config, name, app, spec)


def incidents(config: Config, source: str) -> Sequence[Incident]:
    """Every incident of a source, oldest first."""
    return Incidents.of(config, source).all()


def repair(config: Config, source: str) -> Sequence[Incident]:
    """Dump the keys of every open incident of a source again; gives them as they ended.

    What was dumped is in the log when this returns; loads and apps take it from there as any change.

    Raises:
        RepairError: the keys of a document are not those of a table.
        DeltaworksError: whatever a dump raises.
    """
    kept = Incidents.of(config, source)
    return [_repaired(config, source, kept, incident) for incident in kept.open()]


def _repaired(config: Config, source: str, kept: Incidents, incident: Incident) -> Incident:
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


# Sinks


def _audit_sink(config: Config, name: str, app: App, spec: SinkSpec) -> SinkAudit:
    if not _is_comparable(spec) or config.app(name).shares is not None:
        return SinkAudit(app=name, sink=spec.name, is_readable=False)
    file = config.app_folder(name) / STATE_FILE
    # The ledger first: what leaves meanwhile is newer in the sink, which is no fault.
    left = _left(file)
    suspects = _suspects(config, name, app, spec, left)
    if suspects:
        # Once more, as of now: a document may be on its way.
        suspects = _suspects(
            config, name, app, spec, {key: each for key, each in _left(file).items() if key in suspects}
        )
    loss = None
    if suspects:
        windows = _windows(app, suspects.values())
        keys = {str(app.entity.name): tuple((text_of(each.key),) for each in suspects.values())}
        loss = Loss(hop=f"sink {name}/{spec.name}", after=-1, up_to=-1, missing=windows, keys=keys, is_whole=True)
    return SinkAudit(app=name, sink=spec.name, documents=len(left), loss=loss)


def _is_comparable(spec: SinkSpec) -> bool:
    able = spec.capabilities
    return able.can_read_back and not able.may_forget and not able.is_event


def _left(file: Path) -> dict[str, LeftDocument]:
    with LedgerReader(file) as ledger:
        return {key_text(document.key): document for document in ledger.documents()}


def _suspects(
    config: Config, name: str, app: App, spec: SinkSpec, left: Mapping[str, LeftDocument]
) -> dict[str, LeftDocument]:
    reader = open_reader(spec, app=name, key=app.document_key, config=config)
    try:
        stored = {each.key: each for each in reader.versions() if each.key in left}
    finally:
        reader.close()
    return {key: each for key, each in left.items() if not _is_as_left(each, stored.get(key), spec.name)}


def _is_as_left(document: LeftDocument, stored: StoredVersion | None, sink: str) -> bool:
    if document.is_in(sink):
        return (
            stored is not None
            and (_is_newer(stored, document) or not stored.is_deleted)
            and not (stored.version < document.version)
        )
    return stored is None or stored.is_deleted or _is_newer(stored, document)


def _is_newer(stored: StoredVersion, document: LeftDocument) -> bool:
    return stored.version > document.version


def _windows(app: App, documents: Iterable[LeftDocument]) -> WindowSet:
    counts: dict[tuple[str, int], int] = {}
    for document in documents:
        key = (str(app.entity.name), document.committed_at // 60_000_000)
        counts[key] = counts.get(key, 0) + 1
    return WindowSet({key: Window(count=count, sum=0, xor=0) for key, count in counts.items()})
