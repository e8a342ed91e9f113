"""Records a source into its change log: stream, dump merge, group, append, confirm.

    stream.next ──► remember ──► settle a chunk at its mark ──► append (durable) ──► confirm
                                  chunk + mark ◄── next chunk of the dump, one at a time

Whatever line the process dies on, the log ends at a whole group, and the group holds the position
and the cursors of all dumps: one write. The source is confirmed only after that write returned, so
the worst a crash does is that the last chunk is read once more.

Where the source no longer has what comes next (`SlotInvalidatedError`), that is a gap with a name. It is said
aloud, stored, and repaired: a new slot, a dump of every table, deletes of the rows that are gone. Where the
catalog shows a change that the stream cannot (see `capture.schema_change`), the table is dumped again. So it is
where groups of the log itself are lost (see `mending`): one mechanism for every gap.
"""

import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

import structlog

from deltaworks import faults
from deltaworks.capture.continuity import Gap, SourceLease
from deltaworks.capture.proof import Proof
from deltaworks.capture.schema_change import SchemaChange
from deltaworks.capture.source import (
    ChangeStream,
    Slice,
    SlotInvalidatedError,
    Source,
    StreamFormatError,
    UndecodableError,
)
from deltaworks.change import READ
from deltaworks.errors import RetryableError
from deltaworks.log.canary import Canaries
from deltaworks.log.change_log import (
    CorruptLogError,
    Group,
    LogAwayError,
    LogEnd,
    LogFullError,
    LogReader,
    LogWriter,
)
from deltaworks.log.dump_requests import DumpRequests
from deltaworks.log.dumping import Dumping, OnProgress
from deltaworks.log.losses import LogMendedError, Losses, Mending
from deltaworks.log.sweep import Sweep
from deltaworks.log.watch import Watch
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName

IDLE_S = 0.25
"""How long one wait for changes lasts; the time a stop takes on an idle source."""

EMPTY_GROUP_EVERY_S = 10.0
"""How often the log notes a position without changes, so that the source can let go of its own log."""

FULL_LOG_PATIENCE_S = 30.0
"""How long a drain waits for space. A service waits until it is stopped."""

STUMBLES, STUMBLED_FOR_S = 3, 10.0
"""How often, and for how long, the server may fail to decode its log at one place until what follows counts as lost."""

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 15.0

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What a run recorded. `reads` counts dumped rows per table's full name, `changes` the streamed ones."""

    changes: int = 0
    reads: Mapping[str, int] = field(default_factory=dict)
    transactions: int = 0
    groups: int = 0
    position: Lsn = START
    duration_s: float = 0.0


def drain(
    source: Source,
    writer: LogWriter,
    reader: LogReader,
    *,
    on_progress: OnProgress | None = None,
    requests: DumpRequests | None = None,
    mending: Mending | None = None,
) -> RecordReport:
    """Record up to now: dumps are complete, and everything committed before the call is in the log.

    `reader` reads the log that `writer` writes; `requests` are dumps that were asked for, which end here
    too unless they are paused; `mending` mends that log, and what is lost with its groups is dumped again here.
    Works on an idle source: it writes a mark and waits for that.

    Raises:
        RetryableError: the source is away, its slot is held, or the log is full; a later call goes on.
        TerminalError: the source cannot be captured as it is.
    """
    run = _Run(source, writer, reader, on_progress=on_progress, requests=requests, mending=mending, stop=None)
    pause_s, has_another_form = FIRST_RETRY_S, False
    while True:
        try:
            run.record(until_drained=True)
            return run.report()
        except StreamFormatError as error:
            if has_another_form:
                raise
            has_another_form = True
            logger.info("the stream is opened once more", source=source.name, reason=str(error))
        except UndecodableError as error:
            # It ends: either it goes on, or after `STUMBLED_FOR_S` the next try repairs it or gives up.
            logger.warning("the stream is opened once more", source=source.name, reason=str(error))
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_RETRY_S)
        except LogMendedError as error:
            logger.info("the stream is opened once more", source=source.name, reason=str(error))


def follow(
    source: Source,
    writer: LogWriter,
    reader: LogReader,
    *,
    stop: threading.Event,
    on_progress: OnProgress | None = None,
    requests: DumpRequests | None = None,
    lease: SourceLease | None = None,
    canary_s: float | None = None,
    mending: Mending | None = None,
) -> RecordReport:
    """Record until `stop` is set. Reconnects after a `RetryableError`, with growing pauses.

    With `canary_s` a canary is written every so many seconds; see `canary`.

    With a `lease`, it is asked for before every connection, and nothing is appended after it is known to be lost.

    Raises:
        LeaseLostError: another reader took over; everything up to the log's end is safe.
        TerminalError: the source cannot be captured as it is, or the log is lost to another writer.
    """
    run = _Run(
        source,
        writer,
        reader,
        on_progress=on_progress,
        requests=requests,
        mending=mending,
        stop=stop,
        lease=lease,
        canary_s=canary_s,
    )
    pause_s = FIRST_RETRY_S
    while not stop.is_set():
        before = run.groups
        try:
            run.record(until_drained=False)
        except RetryableError as error:
            pause_s = FIRST_RETRY_S if run.groups > before else min(pause_s * 2, LAST_RETRY_S)
            logger.warning("capture is interrupted", source=source.name, error=str(error), retry_in_s=pause_s)
            source.close()
            stop.wait(pause_s)
    return run.report()


class _Stumble(NamedTuple):
    """The server could not decode its log behind a position."""

    position: Lsn
    at: float
    said: str


class _Run:
    """One call of `drain` or `follow`; `record` is one connection's life."""

    def __init__(
        self,
        source: Source,
        writer: LogWriter,
        reader: LogReader,
        *,
        on_progress: OnProgress | None,
        requests: DumpRequests | None,
        mending: Mending | None,
        stop: threading.Event | None,
        lease: SourceLease | None = None,
        canary_s: float | None = None,
    ) -> None:
        self.groups = 0
        self._canary_s = canary_s
        self._lease = lease
        self._source = source
        self._writer = writer
        self._reader = reader
        self._on_progress = on_progress
        self._requests = requests
        self._mending = mending
        self._stop = stop
        self._began_at = time.monotonic()
        self._changes = 0
        self._transactions = 0
        self._reads: dict[str, int] = {}
        self._stumbled: list[_Stumble] = []
        self._start()

    def record(self, *, until_drained: bool) -> None:
        """Record over one connection until drained, stopped, or an error ends it."""
        try:
            self._record(until_drained=until_drained)
        except UndecodableError as error:
            # The stream leads to the same place each time, also where groups without changes come before it.
            self._stumbled.append(_Stumble(self._writer.end().position, time.monotonic(), str(error)))
            raise
        except CorruptLogError as error:
            raise self._losses.after(error) from error

    def _record(self, *, until_drained: bool) -> None:
        self._start()
        if self._lease is not None:
            self._lease.check()
        # The stream begins with the whole transaction again.
        self._writer.discard_partial()
        end = self._writer.end()
        self._source.prepare(with_slot=end.sequence < 0)
        tables = [schema.name for schema in self._source.tables()]
        self._dumping.load(end.progress)
        self._watch.load(end.progress)
        self._sweep.load(end.progress, tables=tables)
        self._canaries.load(end.progress)
        with self._open(end) as stream, closing(self._dumping):
            if self._begins_at > end.position:
                # The gap is in the log before anything behind it can be.
                self._record_group(stream, Slice(position=self._begins_at))
            self._losses.look(end.position)
            self._dumping.recall()
            self._watch.look(at_once=True)
            target = self._write_mark() if until_drained else None
            while not self._is_over(target):
                self._step(stream)

    def report(self) -> RecordReport:
        """What was recorded so far."""
        return RecordReport(
            changes=self._changes,
            reads=dict(self._reads),
            transactions=self._transactions,
            groups=self.groups,
            position=self._writer.end().position,
            duration_s=time.monotonic() - self._began_at,
        )

    def _start(self) -> None:
        """Forget everything that belongs to one connection. Marks carry the run's id, so a dead run's say nothing."""
        self._id = uuid.uuid4().hex
        self._marks_written = 0
        self._marks_met: set[str] = set()
        self._dumping = Dumping(
            source=self._source,
            reader=self._reader,
            write_mark=self._write_mark,
            on_progress=self._on_progress,
            requests=self._requests,
        )
        self._watch = Watch(source=self._source, reader=self._reader, write_mark=self._write_mark)
        self._sweep = Sweep(reader=self._reader)
        self._canaries = Canaries(every_s=self._canary_s, write_mark=self._write_mark)
        self._begins_at = START
        self._losses = Losses(mending=self._mending, source=self._source, watch=self._watch, redump=self._redump_lost)
        self._appended_at = time.monotonic()

    def _open(self, end: LogEnd) -> AbstractContextManager[ChangeStream]:
        """The stream after the log's end, or a repair of what the source no longer has."""
        try:
            self._check_stumbles(end)
            return self._source.open(resume_after=end.position, known=self._watch.known)
        except SlotInvalidatedError as error:
            logger.error("changes of the source were missed", source=self._source.name, error=str(error))
            if not self._source.repairs_gaps:
                raise
            self._begin_anew(end, str(error))
        return self._source.open(resume_after=START)

    def _check_stumbles(self, end: LogEnd) -> None:
        """Raise where the server could not decode its log from here on, time and again."""
        here = self._stumbled = [stumble for stumble in self._stumbled if stumble.position == end.position]
        if len(here) >= STUMBLES and time.monotonic() - here[0].at >= STUMBLED_FOR_S:
            self._stumbled = []
            raise SlotInvalidatedError(
                f"cannot resume after {end.position}: {len(here)} times {here[-1].said}; the server cannot decode its"
                " own log from there on, a new slot and a dump of the tables mend it"
            )

    def _begin_anew(self, end: LogEnd, reason: str) -> None:
        self._begins_at = self._source.renew(after=end.position)
        gap = Gap(since=end.position, until=self._begins_at, reason=reason, noticed_at=datetime.now(UTC))
        changes = {change.table: change for change in self._watch.begin_anew(gap if end.sequence >= 0 else None)}
        survey = self._watch.known
        if survey is not None and end.sequence >= 0:
            for table in survey.tables:
                self._redump(table, reason="changes were missed", since=survey.position, change=changes.get(table))

    def _redump_lost(self, table: TableName, since: Lsn) -> None:
        self._redump(table, reason="its changes in the log are lost", since=since, change=None)

    def _redump(self, table: TableName, *, reason: str, since: Lsn, change: SchemaChange | None) -> None:
        self._dumping.restart(table, reason)
        self._sweep.owe(table, since=since, is_another=change is not None and change.is_another)

    def _follow_schema(self, position: Lsn) -> None:
        """Dump again what changed in a way that the stream does not show."""
        for change in self._watch.settle(position):
            if change.needs_dump and change.may_lose_rows:
                self._redump(change.table, reason=change.needs_dump, since=change.position, change=change)
            elif change.needs_dump:
                self._dumping.restart(change.table, change.needs_dump)
            elif change.old is None:
                self._dumping.restart(change.table, "it is new")
            elif change.is_rekeyed and not self._dumping.is_table_done(change.table):
                self._dumping.restart(change.table, "its key changed while it was dumped")

    def _sweep_some(self, stream: ChangeStream) -> bool:
        """Read on for the deletes that are owed, and append them; whether it did anything."""
        end = self._writer.end()
        if self._is_unsaved or not self._sweep.is_due(end.position, is_done=self._dumping.is_table_done):
            return False
        if self._sweep.step(up_to_sequence=end.sequence):
            current = {schema.name: schema for schema in self._source.tables()}
            batches = self._sweep.deletes(current, position=end.position, committed_at=datetime.now(UTC))
            self._watch.close_gaps()
            self._record_group(stream, Slice(batches=batches, position=end.position))
        return True

    @property
    def _is_unsaved(self) -> bool:
        return self._dumping.is_unsaved or self._watch.is_unsaved

    def _is_over(self, target: str | None) -> bool:
        if self._stop is not None and self._stop.is_set():
            return True
        is_settled = self._watch.is_settled and self._dumping.is_done and not self._sweep.is_owed
        is_settled = is_settled and not self._losses.is_waiting
        return target is not None and target in self._marks_met and is_settled and not self._is_unsaved

    def _step(self, stream: ChangeStream) -> None:
        if self._writer.end().is_partial:
            # Nothing comes between the parts of a transaction.
            self._take_part(stream)
            return
        self._losses.look(self._writer.end().position)
        self._watch.look()
        self._canaries.advance()
        is_sweeping = self._sweep_some(stream)
        wait_s = self._dumping.advance()
        has_to_save = self._is_unsaved and not self._dumping.is_in_flight
        taken = stream.next(timeout_s=0.0 if has_to_save or is_sweeping else min(wait_s, IDLE_S))
        if taken is None:
            if self._is_unsaved:
                self._record_group(stream, Slice(position=self._writer.end().position))
            return
        self._note(taken)
        reads = self._dumping.settle(taken)
        if taken.mark is not None:
            self._meet(taken.mark, taken)
        if taken.batches or reads or self._must_note(taken):
            self._record_group(stream, replace(taken, batches=(*taken.batches, *reads)))
        if reads:
            faults.reach("dump.after_emit")

    def _take_part(self, stream: ChangeStream) -> None:
        """Append what comes next of a transaction that is too large for one group."""
        taken = stream.next(timeout_s=IDLE_S)
        if taken is None:
            return
        self._note(taken)
        reads = self._dumping.settle(taken)
        if taken.mark is not None:
            self._meet(taken.mark, taken)
        # The last part may be empty, and makes the others visible all the same.
        self._record_group(stream, replace(taken, batches=(*taken.batches, *reads)))

    def _meet(self, mark: str, taken: Slice) -> None:
        if not self._canaries.settle(taken):
            self._marks_met.add(mark)

    def _note(self, taken: Slice) -> None:
        for batch in taken.batches:
            self._watch.note(batch, position=taken.position)
            self._dumping.remember(batch)
        self._follow_schema(taken.position)

    def _must_note(self, taken: Slice) -> bool:
        """Whether a slice without changes is worth a group of its own."""
        is_due = time.monotonic() - self._appended_at >= EMPTY_GROUP_EVERY_S
        # A mark of ours settles a chunk or ends a drain; one of somebody else means that they wait for it.
        return self._is_unsaved or is_due or taken.mark is not None or taken.is_awaited

    def _record_group(self, stream: ChangeStream, taken: Slice) -> None:
        if self._lease is not None and not self._lease.is_held():
            self._lease.check()
        end = self._writer.end()
        is_part = taken.is_partial or end.is_partial
        watched = self._watch.to_json(sequence=end.sequence + 1)
        group = Group(
            batches=taken.batches,
            # What may be forgotten at the next start must not let the source forget anything.
            position=end.position if taken.is_partial else taken.position,
            previous_position=end.position,
            transaction_count=taken.transaction_count,
            progress=self._dumping.to_json() | watched | self._sweep.to_json() | self._canaries.to_json(),
            proof=Proof.of(
                taken.batches, after=end.chain, transaction_count=None if is_part else taken.transaction_count
            ),
            is_partial=taken.is_partial,
        )
        faults.reach("capture.before_append")
        self._append(faults.hand_over("capture.append", group), stream)
        faults.reach("capture.after_append")
        # Only now may the source forget it: append returns when the group is on disk.
        stream.confirm(group.position)
        faults.reach("capture.after_confirm")
        self._dumping.saved()
        self._watch.saved(sequence=end.sequence + 1)
        self._losses.saved(sequence=end.sequence + 1)
        self._count(group)

    def _append(self, group: Group, stream: ChangeStream) -> None:
        began_at, pause_s = time.monotonic(), FIRST_RETRY_S
        while True:
            try:
                self._writer.append(group)
                return
            except (LogFullError, LogAwayError) as error:
                logger.error(
                    "the change log takes no more; the source waits", source=self._source.name, error=str(error)
                )
                if self._stop is None and time.monotonic() - began_at > FULL_LOG_PATIENCE_S:
                    raise
                # The old position again: it says that we live, so the server keeps the connection.
                stream.confirm(group.previous_position)
            if self._pause(pause_s):
                raise LogFullError(
                    f"cannot append to the log of {self._source.name!r} before the stop: it takes no more"
                )
            pause_s = min(pause_s * 2, LAST_RETRY_S)

    def _pause(self, seconds: float) -> bool:
        """Wait; `True` when the run was stopped meanwhile."""
        if self._stop is not None:
            return self._stop.wait(seconds)
        time.sleep(seconds)
        return False

    def _count(self, group: Group) -> None:
        self.groups += 1
        self._appended_at = time.monotonic()
        self._transactions += group.transaction_count
        for batch in group.batches:
            if batch.rows.column("_op")[0].as_py() == READ:
                name = str(batch.schema.name)
                self._reads[name] = self._reads.get(name, 0) + len(batch)
            else:
                self._changes += len(batch)

    def _write_mark(self) -> str:
        self._marks_written += 1
        mark = f"{self._id}:{self._marks_written}"
        self._source.mark(mark)
        return mark
