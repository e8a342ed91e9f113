"""Mending a damaged log: found, made a named gap by its writer, dumped again, and kept as an incident."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from deltaworks.capture.proof import Proof
from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.audit import Loss
from deltaworks.log.change_log import FencedError, Group, LogWriter
from deltaworks.log.damage import LostGroups
from deltaworks.log.mending import LocalMending
from deltaworks.log.registry import log_of, open_reader
from deltaworks.operate.incident import Incident, Incidents, IncidentState
from deltaworks.operate.lease import wait_until
from deltaworks.operate.log import OnProgress


class NotMendableError(TerminalError):
    """A log that `log mend` is not for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """A log that was looked through. `damaged` is where each damaged segment began to be unreadable.

    `lost` are the gaps whose tables are not all dumped again yet; `mended_by` says who rewrote segments.
    """

    source: str
    damaged: Sequence[int]
    lost: Sequence[LostGroups]
    mended_by: str

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.damaged and not self.lost:
            return f"{self.source}: every group in the log's folder can be read"
        found = f"{len(self.damaged):,} damaged segments mended by {self.mended_by}"
        if not self.lost:
            return f"{self.source}: {found}, nothing is lost"
        return f"{self.source}: {found}; capture dumps again what is lost"


def mend_log(config: Config, source: str, *, on_progress: OnProgress | None = None) -> Mended:
    """Read a source's log whole, and have what is damaged mended: here, or by the capture service that holds it.

    What is lost is dumped by the service, or by the next `capture`.

    Raises:
        NotMendableError: the log is no local one, or not that of a source.
        CorruptLogError: where the damage ends cannot be known.
        ServiceSlowError: the service did not mend it.
    """
    mending = _mending(config, source)
    segments = f"{source}: segments of the log"
    damaged = mending.look_through(None if on_progress is None else lambda *done: on_progress(segments, *done))
    mended_by = "nobody"
    if damaged or mending.suspects():
        mended_by = _mend(config, source, mending)
    tell_incidents(config, source)
    return Mended(source=source, damaged=damaged, lost=_open(config, source), mended_by=mended_by)


def tell_incidents(config: Config, source: str) -> None:
    """Keep an incident for every gap in a source's log, and say of each whether it is repaired."""
    mending = log_of(config, source).mending()
    kept, lost = Incidents.of(config, source), () if mending is None else mending.lost()
    if not lost:
        return
    known = {incident.id: incident for incident in kept.all()}
    still_open = {(each.first, each.last) for each in _open(config, source)}
    for each in lost:
        incident = known.get(_id(each)) or Incident(
            id=_id(each),
            found_at=each.noticed_at,
            loss=Loss(
                hop="log",
                after=each.first - 1,
                up_to=each.last,
                missing=each.windows,
                what=f"{each.summary}; damaged file {', '.join(each.files) or 'missing'}",
            ),
        )
        if (each.first, each.last) not in still_open and incident.state is IncidentState.OPEN:
            kept.end(incident, IncidentState.REPAIRED)
        elif incident.id not in known:
            kept.save(incident)


def is_of_a_gap(config: Config, source: str, incident: Incident) -> bool:
    """Whether an incident is that of a named gap, which capture repairs."""
    mending = log_of(config, source).mending()
    return mending is not None and any(incident.id == _id(lost) for lost in mending.lost())


def _id(lost: LostGroups) -> str:
    return f"{lost.noticed_at:%Y%m%d-%H%M%S}-{lost.first}-{lost.last}"


def _open(config: Config, source: str) -> list[LostGroups]:
    """The gaps that are not repaired."""
    mending = log_of(config, source).mending()
    if mending is None:
        return []
    # What is taken first: a repair that ends in between is seen as ended.
    lost = mending.lost()
    gaps = [gap["noticed_at"] for gap in open_reader(config, source).end().progress.get("gaps", ())]
    return [each for each in lost if each.taken_at is None or each.noticed_at.isoformat() in gaps]


def _mending(config: Config, source: str) -> LocalMending:
    if source in config.apps:
        raise NotMendableError(
            f"cannot mend the log {source!r}: it is what app {source!r} made of its source; restore it from a copy, or "
            f"remove it with what the lake has of it and run `deltaworks replay {source}`"
        )
    config.source(source)
    mending = log_of(config, source).mending()
    if mending is None:
        raise NotMendableError(
            f"cannot mend the log of {source!r}: it is on Kafka, where brokers mend a replica from the others; "
            f"`deltaworks log verify {source}` reads it"
        )
    return mending


def _mend(config: Config, source: str, mending: LocalMending) -> str:
    log = log_of(config, source)
    try:
        writer = log.writer()
    except FencedError:
        wait_until(lambda: not mending.suspects(), what=f"the process that writes the log of {source!r}")
        return "the process that writes the log"
    with closing(writer):
        mine = log.mending(writer)
        if mine is not None:
            mine.heed()
            if mine.suspects():
                # It is in the segment that is written to, which the next group closes.
                _note_end(writer)
                mine.heed()
    return "this run"


def _note_end(writer: LogWriter) -> None:
    """Append a group that says nothing new."""
    end = writer.end()
    writer.append(
        Group(
            batches=(),
            position=end.position,
            previous_position=end.position,
            progress=end.progress,
            proof=Proof.of((), after=end.chain),
        )
    )
