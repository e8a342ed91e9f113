"""The audit: does what went in come out, hop by hop, and what mends it where it does not.

reader ─► log ─► lake              sum up windows, compare, name keys by the sketch
            └──► app ─► sinks      what left by key and version, against what each sink says it holds; see `sink_audit`
                          └─► log of the app ─► lake
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.capture.proof import WindowSet
from deltaworks.config import Config
from deltaworks.log.audit import HopAudit, audit_hop, audit_log
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
from deltaworks.operate.incident import Incident, Incidents
from deltaworks.operate.lake import open_lake_if_there
from deltaworks.operate.mending import tell_incidents
from deltaworks.operate.sink_audit import Ledgers, SinkAudit, audit_sink, is_comparable, same_sink
from deltaworks.position import Lsn
from deltaworks.process.app import App
from deltaworks.process.direct.reducer import is_direct
from deltaworks.process.ledger.left_keys import LeftKeys
from deltaworks.process.ledger.stood import Stood, stood
from deltaworks.process.registry import load_app
from deltaworks.process.sink import SinkSpec
from deltaworks.store.load import loaded_spans

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppAudit:
    """The sinks of an app, and its entities; `None` where nothing left since they were compared."""

    sinks: Sequence[SinkAudit]
    entities: Sequence[Stood] | None = None


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
                    "undecided": each.undecided,
                    "missing": each.missing,
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
    tell_incidents(config, source)
    incidents = Incidents.of(config, source)
    mark = AuditMark.read(config, source) if is_since_last else AuditMark()
    reader = open_log(config, source)
    end = reader.end()
    apps = {name: load_app(config, name) for name, app in config.apps.items() if app.source == source}
    look = _Look(mark=mark, known=incidents.known())
    look.at_log(reader, hop="log")
    entities: dict[str, Sequence[Stood]] = {}
    sinks: list[SinkAudit] = []
    with open_lake_if_there(config) as lake:
        if lake is not None:
            look.at_hop(reader, loaded_spans(lake, source), hop="lake")
        for name, app in apps.items():
            tables = {str(table.name) for table in app.tables}
            with Ledgers(config, name) as ledgers:
                for member, ledger in ledgers.by_member.items():
                    hop = f"app {name}" if member == name else f"app {name}/{member}"
                    look.at_hop(reader, ledger.spans(), hop=hop, tables=tables)
                of_app = look.at_sinks(config, name, app, ledgers)
            sinks += of_app.sinks
            if of_app.entities is not None:
                entities[name] = of_app.entities
            own = open_log(config, name)
            if own.end().sequence >= 0:
                look.at_log(own, hop=f"log {name}")
                if lake is not None:
                    look.at_hop(own, loaded_spans(lake, name), hop=f"lake {name}")
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

    def at_sinks(self, config: Config, name: str, app: App, ledgers: Ledgers) -> AppAudit:
        digest = ledgers.digest()
        marks = {_mark_of(name, spec): spec for spec in app.sinks}
        known = {mark: self.mark.sinks[mark] for mark in marks if self.mark.sinks.get(mark, "").endswith(f" {digest}")}
        if len(known) == sum(map(is_comparable, app.sinks)) > 0:
            # Nothing left since, so there is nothing to read.
            self.sink_marks |= known
            documents = int(next(iter(known.values())).partition(" ")[0])
            return AppAudit(sinks=[same_sink(name, spec, documents=documents) for spec in app.sinks])
        left = ledgers.left()
        sinks = []
        for mark, spec in marks.items():
            sinks.append(audit_sink(app, spec, ledgers, left))
            if sinks[-1].is_readable and not sinks[-1].undecided:
                self.sink_marks[mark] = f"{len(left)} {digest}"
        keeps_rows = not is_direct(app) or any(each.keeps_rows() for each in ledgers.by_member.values())
        entities = stood(
            left if app.document_key == app.key else LeftKeys.of(()),
            list(ledgers.by_member.values()),
            entity=app.entity.name.short,
            keeps_rows=keeps_rows or config.app(name).shares is not None,
        )
        return AppAudit(sinks=sinks, entities=entities)


def _mark_of(app: str, spec: SinkSpec) -> str:
    return f"{app}/{type(spec).__name__} {spec.name}"


def incidents(config: Config, source: str) -> Sequence[Incident]:
    """Every incident of a source, oldest first."""
    tell_incidents(config, source)
    return Incidents.of(config, source).all()
