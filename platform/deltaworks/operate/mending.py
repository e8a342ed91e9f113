"""Mending a damaged log: found, made a named gap by its writer, brought back, and kept as an incident.

What a source's log lost is dumped again by capture. What an app's own log lost are documents, which the app makes anew.
"""

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
from deltaworks.operate.app import lake_tables_of
from deltaworks.operate.asking import reprocess
from deltaworks.operate.incident import Incident, Incidents, IncidentState
from deltaworks.operate.lease import taken_unless_done
from deltaworks.operate.log import OnProgress


class NotMendableError(TerminalError):
    """A log that `log mend` is not for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """A log that was looked through. `damaged` is where each damaged segment began to be unreadable.

    `lost` are the gaps whose tables were not all dumped again before; `mended_by` says who rewrote segments.
    `made_anew` documents were made again by an app because of them; `None` for the log of a source.
    """

    source: str
    damaged: Sequence[int]
    lost: Sequence[LostGroups]
    mended_by: str
    made_anew: int | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.damaged and not self.lost:
            return f"{self.source}: every group in the log's folder can be read"
        found = f"{len(self.damaged):,} damaged segments mended by {self.mended_by}"
        if not self.lost:
            return f"{self.source}: {found}, nothing is lost"
        if self.made_anew is not None:
            return f"{self.source}: {found}; {self.made_anew:,} documents are made anew, of all that the app has"
        return f"{self.source}: {found}; capture dumps again what is lost"


def mend_log(config: Config, source: str, *, on_progress: OnProgress | None = None) -> Mended:
    """Read the log of a source, or of an app, whole, and have what is damaged mended: here, or by the capture service
    that holds it.

    What is lost of a source's is dumped by the service, or by the next `capture`. Of an app's, all documents are made
    anew before this returns.

    Raises:
        NotMendableError: the log is no local one, an app's service holds it, or an app writes to it no more; then the
            gap is named, and the same call pays what is lost once the app writes to it again.
        CorruptLogError: where the damage ends cannot be known.
        ServiceSlowError: the service did not mend it.
    """
    mending = _mending(config, source)
    segments = f"{source}: segments of the log"
    damaged = mending.look_through(None if on_progress is None else lambda *done: on_progress(segments, *done))
    mended_by = "nobody"
    if damaged or mending.suspects():
        mended_by = _mend(config, source, mending)
    if source in config.apps:
        lost = mending.owed()
        made = _make_anew(config, source, mending, lost, on_progress)
        return Mended(source=source, damaged=damaged, lost=lost, mended_by=mended_by, made_anew=made)
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
    if source not in config.apps:
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

    def take() -> LogWriter:
        try:
            return log.writer(mends=True)
        except FencedError as error:
            if source not in config.apps:
                raise
            raise NotMendableError(
                f"cannot mend the log of app {source!r}: {error}; stop the app's service, run this again, then start it"
            ) from error

    writer = taken_unless_done(
        take,
        FencedError,
        is_done=lambda: not mending.suspects(),
        what=f"the process that writes the log of {source!r}",
    )
    if writer is None:
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


def _make_anew(
    config: Config, app: str, mending: LocalMending, lost: Sequence[LostGroups], on_progress: OnProgress | None
) -> int:
    """Have an app make all its documents anew where its log lost any; how many.

    The rows of its source are in its state, those that are gone as well; which documents were lost is not known.
    """
    if not lost:
        return 0
    _check_payable(config, app)
    entities = f"{app}: documents"
    done = None if on_progress is None else lambda *counts: on_progress(entities, *counts)
    answered = reprocess(config, app, on_progress=done)
    end = open_reader(config, app).end().sequence
    for each in lost:
        mending.taken(each, sequence=end)
    return answered.outcome.count


def _check_payable(config: Config, app: str) -> None:
    """See that what makes all documents anew brings them into the log: an app that is shared writes to none."""
    shares = config.app(app).shares
    if shares is None and lake_tables_of(config, app):
        return
    if shares is None:
        why, step = "none of its sinks is a LakeTable", "put its LakeTable back"
    else:
        why = f"it has {shares} shares, and a lake table has one writer"
        step = f"take `shares` out of apps.{app} (its LakeTable stays)"
    raise NotMendableError(
        f"cannot make anew what the log of app {app!r} lost: {why}, so no document of it comes into that log; the gap "
        f"is named, and what is lost stays owed; {step}, and run `deltaworks log mend {app}` again: it makes every "
        "document anew, and the next load takes them"
    )


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
