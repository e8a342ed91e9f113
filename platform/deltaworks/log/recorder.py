"""Records a source into its change log: stream, dump merge, group, append, confirm.

    stream.next ──► remember ──► settle a chunk at its mark ──► append (durable) ──► confirm
                                  chunk + mark ◄── next chunk of the dump, one at a time

Whatever line the process dies on, the log ends at a whole group, and the group holds the position
and the cursors of all dumps: one write. The source is confirmed only after that write returned, so
the worst a crash does is that the last chunk is read once more.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice

import structlog

from deltaworks import faults
from deltaworks.capture.dump import DumpState, Recent, TableDump, TextKey, settle, strays
from deltaworks.capture.source import ChangeStream, Chunk, Slice, Source
from deltaworks.change import ChangeBatch
from deltaworks.errors import InvariantError, RetryableError
from deltaworks.log.change_log import Group, LogFullError, LogReader, LogWriter, StoredGroup
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName

IDLE_S = 0.25
"""How long one wait for changes lasts; the time a stop takes on an idle source."""

FENCE_POLL_S = 0.05
"""How often a waiting dump looks whether the transactions before it have ended."""

EMPTY_GROUP_EVERY_S = 10.0
"""How often the log notes a position without changes, so that the source can let go of its own log."""

REPAIR_KEYS = 500
"""Keys of one repair read; a statement takes 65,535 parameters at most."""

FULL_LOG_PATIENCE_S = 30.0
"""How long a drain waits for space. A service waits until it is stopped."""

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 15.0

CLOCK_MARGIN = timedelta(minutes=1)
"""Commit times are taken before the commit is written, so their order is off by a little."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpProgress:
    """How far the dump of a table is; `estimated_rows` is `None` when the source cannot say."""

    table: TableName
    rows: int
    estimated_rows: int | None
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What a run recorded. `reads` counts dumped rows per table's full name, `changes` the streamed ones."""

    changes: int = 0
    reads: Mapping[str, int] = field(default_factory=dict)
    transactions: int = 0
    groups: int = 0
    position: Lsn = START
    duration_s: float = 0.0


OnProgress = Callable[[DumpProgress], None]


def drain(
    source: Source, writer: LogWriter, reader: LogReader, *, on_progress: OnProgress | None = None
) -> RecordReport:
    """Record up to now: dumps are complete, and everything committed before the call is in the log.

    `reader` reads the log that `writer` writes. Works on an idle source too: it writes a mark and
    waits for that.

    Raises:
        RetryableError: the source is away, its slot is held, or the log is full; a later call goes on.
        TerminalError: the source cannot be captured as it is.
    """
    run = _Run(source, writer, reader, on_progress=on_progress, stop=None)
    run.record(until_drained=True)
    return run.report()


def follow(
    source: Source,
    writer: LogWriter,
    reader: LogReader,
    *,
    stop: threading.Event,
    on_progress: OnProgress | None = None,
) -> RecordReport:
    """Record until `stop` is set. Reconnects after a `RetryableError`, with growing pauses.

    Raises:
        TerminalError: the source cannot be captured as it is, or the log is lost to another writer.
    """
    run = _Run(source, writer, reader, on_progress=on_progress, stop=stop)
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


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A chunk that was read and waits for its mark; `keys` are set for a repair read."""

    table: TableName
    chunk: Chunk
    mark: str
    keys: tuple[TextKey, ...] | None


class _Run:
    """One call of `drain` or `follow`; `record` is one connection's life."""

    def __init__(
        self,
        source: Source,
        writer: LogWriter,
        reader: LogReader,
        *,
        on_progress: OnProgress | None,
        stop: threading.Event | None,
    ) -> None:
        self.groups = 0
        self._source = source
        self._writer = writer
        self._reader = reader
        self._on_progress = on_progress
        self._stop = stop
        self._began_at = time.monotonic()
        self._changes = 0
        self._transactions = 0
        self._reads: dict[str, int] = {}
        self._estimates: dict[TableName, int | None] = {}
        self._start()

    def record(self, *, until_drained: bool) -> None:
        """Record over one connection until drained, stopped, or an error ends it."""
        self._start()
        self._source.prepare()
        self._load_dumps()
        with self._source.open(resume_after=self._writer.end().position) as stream:
            self._recall()
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
        self._recent = Recent()
        self._flight: _Flight | None = None
        self._fence: int | None = None
        self._dumps: dict[TableName, TableDump] = {}
        self._is_unsaved = False
        self._appended_at = time.monotonic()

    def _is_over(self, target: str | None) -> bool:
        if self._stop is not None and self._stop.is_set():
            return True
        return target is not None and target in self._marks_met and not self._pending() and not self._is_unsaved

    def _step(self, stream: ChangeStream) -> None:
        is_waiting = self._advance_dump()
        has_to_save = self._is_unsaved and self._flight is None
        taken = stream.next(timeout_s=0.0 if has_to_save else FENCE_POLL_S if is_waiting else IDLE_S)
        if taken is None:
            if self._is_unsaved:
                self._record_group(stream, Slice(position=self._writer.end().position))
            return
        for batch in taken.batches:
            self._remember(batch)
        reads = self._settle(taken)
        if taken.mark is not None:
            self._marks_met.add(taken.mark)
        if taken.batches or reads or self._must_note(taken):
            self._record_group(stream, replace(taken, batches=(*taken.batches, *reads)))

    def _must_note(self, taken: Slice) -> bool:
        """Whether a slice without changes is worth a group of its own."""
        is_due = time.monotonic() - self._appended_at >= EMPTY_GROUP_EVERY_S
        # A mark of ours settles a chunk or ends a drain; one of somebody else means that they wait for it.
        return self._is_unsaved or is_due or taken.mark is not None or taken.is_awaited

    def _record_group(self, stream: ChangeStream, taken: Slice) -> None:
        group = Group(
            batches=taken.batches,
            position=taken.position,
            previous_position=self._writer.end().position,
            transaction_count=taken.transaction_count,
            progress={"dumps": {str(table): dump.to_json() for table, dump in self._dumps.items()}},
        )
        faults.reach("capture.before_append")
        self._append(group, stream)
        faults.reach("capture.after_append")
        # Only now may the source forget it: append returns when the group is on disk.
        stream.confirm(group.position)
        faults.reach("capture.after_confirm")
        self._is_unsaved = False
        self._count(group)

    def _append(self, group: Group, stream: ChangeStream) -> None:
        began_at, pause_s = time.monotonic(), FIRST_RETRY_S
        while True:
            try:
                self._writer.append(group)
                return
            except LogFullError as error:
                logger.error("the change log is full; the source waits", source=self._source.name, error=str(error))
                if self._stop is None and time.monotonic() - began_at > FULL_LOG_PATIENCE_S:
                    raise
                # The old position again: it says that we live, so the server keeps the connection.
                stream.confirm(group.previous_position)
            if self._pause(pause_s):
                raise LogFullError(f"cannot append to the log of {self._source.name!r} before the stop: it is full")
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
            if batch.rows.column("_op")[0].as_py() == "r":
                name = str(batch.schema.name)
                self._reads[name] = self._reads.get(name, 0) + len(batch)
            else:
                self._changes += len(batch)

    # Dumps.

    def _load_dumps(self) -> None:
        """Take up the stored cursors. A table that is new in the configuration waits; one that left is forgotten."""
        stored = self._writer.end().progress.get("dumps", {})
        self._dumps = {
            schema.name: TableDump.from_json(stored[str(schema.name)]) if str(schema.name) in stored else TableDump()
            for schema in self._source.tables()
        }

    def _pending(self) -> TableName | None:
        """The table whose dump is next, in configured order."""
        return next((table for table, dump in self._dumps.items() if dump.state is not DumpState.DONE), None)

    def _recall(self) -> None:
        """Remember what earlier runs logged and a new snapshot may still not see."""
        if self._pending() is None:
            return
        running = self._source.running()
        self._fence = running.next_txid
        if running.oldest_began_at is None:
            return
        recalled = list(self._groups_since(running.oldest_began_at, running.visible_in.oldest_running))
        for group in reversed(recalled):
            for batch in group.batches:
                dump = self._dumps.get(batch.schema.name)
                # Their strays are in the stored progress already.
                if dump is not None and dump.state is not DumpState.DONE:
                    self._recent.remember(batch)
        self._recent.forget_seen(running.visible_in)

    def _groups_since(self, began_at: datetime, oldest_running: int) -> Iterator[StoredGroup]:
        """Groups that may hold a transaction which still runs, newest first."""
        for header in self._reader.headers_backwards():
            if header.max_committed_at is not None and header.max_committed_at + CLOCK_MARGIN < began_at:
                return
            if header.max_txid is not None and header.max_txid >= oldest_running:
                yield from islice(self._reader.read(after_sequence=header.sequence - 1, max_changes=1), 1)

    def _remember(self, batch: ChangeBatch) -> None:
        dump = self._dumps.get(batch.schema.name)
        if dump is None or dump.state is DumpState.DONE:
            return
        self._recent.remember(batch)
        moved = frozenset(strays(batch))
        if moved:
            self._dumps[batch.schema.name] = replace(dump, strays=dump.strays | moved)

    def _advance_dump(self) -> bool:
        """Read the next chunk and mark it, unless one is under way. `True` while the dump must wait."""
        table = self._pending()
        if self._flight is not None or table is None:
            return False
        dump = self._dumps[table]
        if dump.state is DumpState.WAITING:
            if not self._is_fence_passed():
                return True
            self._begin(table, dump)
            return False
        keys = tuple(sorted(dump.strays))[:REPAIR_KEYS] if dump.state is DumpState.REPAIRING else None
        if keys is not None:
            chunk = self._source.rows(table, keys=keys)
        else:
            if dump.up_to_key is None:
                raise InvariantError(f"cannot go on with the dump of {table}: its progress has no last key")
            chunk = self._source.chunk(
                table, after_key=dump.after_key, up_to_key=dump.up_to_key, limit=self._source.chunk_rows
            )
        faults.reach("dump.after_select")
        self._recent.forget_seen(chunk.visible_in)
        self._flight = _Flight(table=table, chunk=chunk, mark=self._write_mark(), keys=keys)
        faults.reach("dump.after_mark")
        return False

    def _is_fence_passed(self) -> bool:
        """Whether every transaction that ran when this run began has ended.

        One that wrote to a table before its changes were captured is in no stream. Once it has
        ended, every snapshot sees it, and the dump reads what it wrote.
        """
        running = self._source.running()
        self._recent.forget_seen(running.visible_in)
        if self._fence is None:
            self._fence = running.next_txid
        return running.visible_in.oldest_running >= self._fence

    def _begin(self, table: TableName, dump: TableDump) -> None:
        last_key = self._source.last_key(table)
        self._set_dump(table, dump.begun(last_key))
        logger.info("the dump of a table begins", source=self._source.name, table=str(table))

    def _settle(self, taken: Slice) -> tuple[ChangeBatch, ...]:
        """The reads of the chunk whose mark ends this slice."""
        flight = self._flight
        if flight is None or taken.mark != flight.mark:
            return ()
        if taken.mark_position is None or taken.mark_committed_at is None:
            raise InvariantError(f"cannot settle a chunk of {flight.table}: its mark came back without a position")
        self._flight = None
        unseen = self._recent.unseen(flight.table, flight.chunk.visible_in)
        settled = settle(flight.chunk, unseen, position=taken.mark_position, committed_at=taken.mark_committed_at)
        if settled.is_stale:
            logger.info("a chunk is read again: the table changed its shape", table=str(flight.table))
            return ()
        dump = self._dumps[flight.table]
        if flight.keys is not None:
            self._set_dump(flight.table, dump.repaired(flight.keys, settled))
        else:
            self._set_dump(flight.table, dump.advanced(settled, last_key=flight.chunk.last_key))
        return () if settled.reads is None else (settled.reads,)

    def _set_dump(self, table: TableName, dump: TableDump) -> None:
        self._dumps[table] = dump
        self._is_unsaved = True
        is_done = dump.state is DumpState.DONE
        if is_done:
            self._recent.forget_table(table)
        if self._on_progress is not None:
            if table not in self._estimates:
                self._estimates[table] = self._source.estimated_rows(table)
            self._on_progress(
                DumpProgress(table=table, rows=dump.rows, estimated_rows=self._estimates[table], is_done=is_done)
            )

    def _write_mark(self) -> str:
        self._marks_written += 1
        mark = f"{self._id}:{self._marks_written}"
        self._source.mark(mark)
        return mark
