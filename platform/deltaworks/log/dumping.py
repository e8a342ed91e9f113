"""Drives the dumps of a source beside its stream: one chunk at a time, settled at its mark.

    other thread:  read a chunk ─┐
    advance:                     └► write its mark ──► stream … ──► settle at the mark ──► reads for the group

Every captured table is dumped once without being asked; more dumps come as requests and take turns, a
read each. What is decided is decided in `capture.dump`; this module keeps the cursors, asks the source,
and remembers what was streamed. Its progress is stored with the group that reached it, so that at most
one chunk is read again after a crash.

Memory is bounded by one chunk, by the changes between two snapshots, and by `HELD_BYTES` of changes
that were streamed while nobody can see them yet. Past that the changes are let go of, they are in the
log, and their table is read on once they are visible.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.capture.bag import settle_bag
from deltaworks.capture.dump import DumpState, Settled, TableDump, settle, strays
from deltaworks.capture.pace import Pace
from deltaworks.capture.recent import Recent
from deltaworks.capture.source import DumpBlockedError, Running, Slice, Source
from deltaworks.change import ChangeBatch
from deltaworks.errors import InvariantError, TerminalError
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.log.dump_parts import INITIAL, AskedDump, Part, Turns
from deltaworks.log.dump_reads import Begun, Flight, Read, read_next
from deltaworks.log.dump_requests import DumpOutcome, DumpRequest, DumpRequests, Ending, Wanted
from deltaworks.schema import TableName

CLOCK_MARGIN = timedelta(minutes=1)
"""Commit times are taken before the commit is written, so their order is off by a little."""

FENCE_POLL_S = 0.05
"""How often a waiting dump looks whether the transactions before it have ended."""

READ_POLL_S = 0.005
"""How long the stream is waited for while a chunk is being read; what the end of a read can be noticed late."""

REQUEST_POLL_S = 0.25
"""How often new requests are looked for."""

BLOCKED_S = 2.0
"""How long a table that could not be read rests."""

HELD_BYTES = 64 << 20
"""Changes kept in memory for dumps."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpProgress:
    """How far the dump of a table is; `estimated_rows` is `None` when the source cannot say."""

    table: TableName
    rows: int
    estimated_rows: int | None
    is_done: bool
    dump_id: str = INITIAL


OnProgress = Callable[[DumpProgress], None]


@dataclass(slots=True, kw_only=True)
class Dumping:
    """All dumps of a source during one connection's life. Not thread-safe; `close` it at the end.

    `write_mark` commits a mark into the source's log and returns its id.
    """

    source: Source
    reader: LogReader
    write_mark: Callable[[], str]
    on_progress: OnProgress | None = None
    requests: DumpRequests | None = None
    is_unsaved: bool = False
    """Whether the cursors moved since they were last stored."""
    _initial: dict[TableName, Part] = field(default_factory=dict)
    _asked: dict[str, AskedDump] = field(default_factory=dict)
    _recent: Recent = field(default_factory=Recent)
    _read: Read | None = None
    _flight: Flight | None = None
    _fence: int | None = None
    _is_fence_passed: bool = False
    _looked_at: dict[str, float] = field(default_factory=dict)
    _turns: Turns = field(default_factory=Turns)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dump"))

    @property
    def is_done(self) -> bool:
        """Whether no dump is owed; one that is paused is not."""
        has_ended = all(
            dump.ending is not None or not any(p.is_owed for p in dump.parts.values()) for dump in self._asked.values()
        )
        return has_ended and not any(part.is_owed for part in self._initial.values())

    @property
    def is_in_flight(self) -> bool:
        """Whether a chunk was read whose mark has not come back."""
        return self._flight is not None

    def is_table_done(self, table: TableName) -> bool:
        """Whether the log has every row of a table, by reads or by changes."""
        part = self._initial.get(table)
        return part is not None and part.is_done

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The cursors, as they are stored in a group's progress."""
        return {
            "dumps": {str(table): part.cursor.to_json() for table, part in self._initial.items()},
            "asked": {dump_id: dump.to_json() for dump_id, dump in self._asked.items()},
        }

    def load(self, progress: Mapping[str, Any]) -> None:  # Any: JSON values
        """Take up the stored cursors. A table that is new in the configuration waits; one that left is forgotten."""
        stored = progress.get("dumps", {})
        self._initial = {
            schema.name: self._part(INITIAL, schema.name, stored.get(str(schema.name)))
            for schema in self.source.tables()
        }
        if self.requests is not None:
            asked = progress.get("asked", {})
            for request in self.requests.open():
                self._take_up(request, asked.get(request.id))

    def recall(self) -> None:
        """Remember what earlier runs logged and a new snapshot may still not see."""
        tables = {part.table for part in self._parts() if part.is_owed}
        if not tables:
            return
        running = self.source.running()
        self._fence = running.next_txid
        self._recall(tables, running)

    def remember(self, batch: ChangeBatch) -> None:
        """Take note of changes that were streamed."""
        table = batch.schema.name
        parts = [part for part in self._parts() if part.table == table and not part.is_done]
        if not parts:
            return
        if moved := frozenset(strays(batch)):
            for part in parts:
                if not part.add_strays(moved):
                    logger.warning("too many rows moved: their table is dumped from its start", table=str(table))
                    self._drop_reads(part)
        if any(part.is_owed for part in parts):
            self._recent.remember(batch)
            if self._recent.byte_count > HELD_BYTES:
                self._let_go()

    def advance(self) -> float:
        """Get on with the dumps; how many seconds the stream may be waited for until there is more to do."""
        self._heed_requests()
        if self._read is not None:
            if not self._read.future.done():
                return READ_POLL_S
            self._take_read(self._read)
        if self._flight is not None:
            return math.inf
        part = self._next_part()
        if part is not None:
            self._start_read(part)
            return READ_POLL_S
        return FENCE_POLL_S if not self.is_done else REQUEST_POLL_S if self.requests is not None else math.inf

    def restart(self, table: TableName, reason: str) -> None:
        """Dump a table anew, from its first row: the log missed what changed in it."""
        part = self._initial.get(table)
        if part is None:
            self._initial[table] = self._part(INITIAL, table, None)
            self.is_unsaved = True
            return
        logger.warning("a table is dumped again", source=self.source.name, table=str(table), reason=reason)
        self._drop_reads(part)
        # A new fence: what was streamed before now and is not visible yet ends before the first chunk is read.
        self._fence, self._is_fence_passed = None, False
        for each in [part, *(each for each in self._parts() if each.table == table and not each.is_done)]:
            self._drop_reads(each)
            each.cursor = TableDump()
        self.is_unsaved = True

    def settle(self, taken: Slice) -> tuple[ChangeBatch, ...]:
        """The reads, and the deletes of missing keys, of the chunk whose mark ends this slice."""
        flight = self._flight
        if flight is None or taken.mark != flight.mark:
            return ()
        part = flight.part
        # Only whoever asked for a key is told that it is gone; a row that moved may well have moved on.
        chunk = flight.chunk if part.keys else replace(flight.chunk, absent=None)
        if taken.mark_position is None or taken.mark_committed_at is None:
            raise InvariantError(f"cannot settle a chunk of {part.table}: its mark came back without a position")
        self._flight = None
        unseen = self._recent.unseen(part.table, chunk.visible_in)
        settle_rows = settle if chunk.schema.key else settle_bag
        settled = settle_rows(chunk, unseen, position=taken.mark_position, committed_at=taken.mark_committed_at)
        if settled.is_stale:
            logger.info("a chunk is read again: the table changed its shape", table=str(part.table))
            return ()
        self._move_cursor(part, flight, settled)
        return tuple(batch for batch in (settled.reset, settled.reads, settled.deletes) if batch is not None)

    def saved(self) -> None:
        """Note that the progress was stored; only now is it told how dumps ended."""
        self.is_unsaved = False
        for dump in [dump for dump in self._asked.values() if dump.ending is not None]:
            self._tell_ending(dump)
            del self._asked[dump.request.id]

    def close(self) -> None:
        """End a read that is under way and wait for its thread."""
        if self._read is not None and not self._read.future.done():
            self.source.interrupt()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # Requests.

    def _heed_requests(self) -> None:
        if self.requests is None or not self._is_time("requests", REQUEST_POLL_S):
            return
        try:
            wanted = {request.id: request for request in self.requests.open()}
        except OSError as error:
            logger.error("requests for dumps cannot be read", source=self.source.name, error=str(error))
            return
        for request in wanted.values():
            if request.id not in self._asked:
                self._take_up(request, None)
                self._recall_again(self._asked[request.id])
            self._heed(self._asked[request.id], request.wanted)
        for dump_id in self._asked.keys() - wanted.keys():
            self._end(self._asked[dump_id], Ending.CANCELLED, "its request was removed")

    def _take_up(self, request: DumpRequest, stored: Mapping[str, Any] | None) -> None:  # Any: JSON values
        """Make a request a dump, at its start or where its stored progress says."""
        tables, unknown = self._tables_of(request)
        cursors: Mapping[str, Any] = stored["tables"] if stored else {}
        parts = {table: self._part(request.id, table, cursors.get(str(table)), request) for table in tables}
        dump = self._asked[request.id] = AskedDump(request=request, parts=parts, unknown_tables=unknown)
        logger.info("a dump was asked for", source=self.source.name, dump=request.id, tables=[str(t) for t in tables])
        self.is_unsaved = True
        if stored and stored["ending"] is not None:
            dump.end(Ending(stored["ending"]), stored["error"])
        elif not tables:
            known = ", ".join(str(table) for table in self._initial)
            dump.end(Ending.FAILED, f"no captured table {', '.join(map(repr, unknown))}; known: {known}")
        self._heed(dump, request.wanted)

    def _tables_of(self, request: DumpRequest) -> tuple[list[TableName], tuple[str, ...]]:
        """The captured tables that a request names, all of them when it names none, and the names it has besides."""
        if not request.tables:
            return list(self._initial), ()
        spelled = {spelling: name for name in self._initial for spelling in (name.short, str(name))}
        found = {text: spelled.get(text) or TableName.parse(text) for text in request.tables}
        known = {name: None for name in found.values() if name in self._initial}
        return list(known), tuple(text for text, name in found.items() if name not in self._initial)

    def _heed(self, dump: AskedDump, wanted: Wanted) -> None:
        if wanted is Wanted.CANCEL:
            self._end(dump, Ending.CANCELLED)
        is_paused = wanted is Wanted.PAUSE
        for part in dump.parts.values():
            if part.is_paused == is_paused:
                continue
            part.is_paused, self.is_unsaved = is_paused, True
            if is_paused:
                self._drop_reads(part)
            else:
                self._recall({part.table}, self.source.running())

    def _recall_again(self, dump: AskedDump) -> None:
        owed = {part.table for part in dump.parts.values() if part.is_owed}
        if owed and dump.ending is None:
            self._recall(owed, self.source.running())

    def _end(self, dump: AskedDump, ending: Ending, error: str | None = None) -> None:
        if dump.ending is None:
            dump.end(ending, error)
            self.is_unsaved = True
            for part in dump.parts.values():
                self._drop_reads(part)
                part.is_paused = not part.is_done
                self._forget_unread(part.table)

    def _tell_ending(self, dump: AskedDump) -> None:
        if self.requests is None or dump.ending is None:
            return
        outcome = DumpOutcome(
            id=dump.request.id,
            ending=dump.ending,
            rows={str(table): part.cursor.rows for table, part in dump.parts.items()},
            missing=self.requests.missing(dump.request.id),
            unknown_tables=dump.unknown_tables,
            error=dump.error,
            asked_at=dump.request.asked_at,
            ended_at=datetime.now(UTC),
        )
        self.requests.end(outcome)
        logger.info("a dump ended", source=self.source.name, dump=outcome.id, ending=outcome.ending.value)

    # Reading.

    def _next_part(self) -> Part | None:
        """The part whose turn it is, of those that can be read now."""
        dumps = {INITIAL: self._initial} | {d: dump.parts for d, dump in self._asked.items() if dump.ending is None}
        return self._turns.next({dump_id: self._ready(parts.values()) for dump_id, parts in dumps.items()})

    def _ready(self, parts: Any) -> Iterator[Part]:
        for part in parts:
            if part.is_owed and not part.is_resting and self._may_begin(part) and self._is_clear(part.table):
                yield part

    def _may_begin(self, part: Part) -> bool:
        """Whether every transaction that ran when its table began to be captured has ended.

        One that wrote to the table before its changes were captured is in no stream. Once it has
        ended, every snapshot sees it, and the dump reads what it wrote. A dump on demand reads a
        table that is captured already and need not wait.
        """
        if part.dump_id != INITIAL or part.cursor.state is not DumpState.WAITING or self._is_fence_passed:
            return True
        if not self._is_time("fence", FENCE_POLL_S):
            return False
        running = self._look()
        if self._fence is None:
            self._fence = running.next_txid
        self._is_fence_passed = running.visible_in.oldest_running >= self._fence
        return self._is_fence_passed

    def _is_clear(self, table: TableName) -> bool:
        """Whether every change that was let go of is visible to whoever reads now."""
        if self._recent.is_clear(table):
            return True
        if self._is_time("clear", FENCE_POLL_S):
            self._look()
        return self._recent.is_clear(table)

    def _look(self) -> Running:
        """Who runs now. What that snapshot sees is seen by every read that begins later, so it is forgotten."""
        running = self.source.running()
        if self._read is None and self._flight is None:
            self._recent.forget_seen(running.visible_in)
        return running

    def _start_read(self, part: Part) -> None:
        repaired = None if part.cursor.state is DumpState.WAITING else part.keys_to_repair()
        if part.cursor.state is not DumpState.WAITING:
            faults.reach("dump.before_select")
        future = self._pool.submit(read_next, self.source, replace(part), repaired)
        self._read = Read(part=part, repaired=repaired, future=future, began_at=time.monotonic())

    def _take_read(self, read: Read) -> None:
        """Begin a table, or mark the chunk that was read."""
        self._read = None
        part = read.part
        try:
            found = read.future.result()
        except DumpBlockedError as error:
            if not read.is_dropped:
                logger.warning("a dump rests", table=str(part.table), error=str(error), retry_in_s=BLOCKED_S)
                part.rests_until = time.monotonic() + BLOCKED_S
            return
        except InvariantError:
            raise
        except TerminalError as error:
            if part.dump_id == INITIAL:
                raise
            if part.dump_id in self._asked:
                self._end(self._asked[part.dump_id], Ending.FAILED, str(error))
            return
        if read.is_dropped:
            return
        if isinstance(found, Begun):
            self._set_cursor(part, part.cursor.begun(found.last_key, estimated_rows=found.estimated_rows))
            logger.info("the dump of a table begins", source=self.source.name, table=str(part.table), dump=part.dump_id)
            return
        faults.reach("dump.after_select")
        if read.repaired is None and not part.keys:
            took_s = found.took_s or time.monotonic() - read.began_at
            part.pace = part.pace.after(row_count=found.scanned, took_s=took_s, budget_s=self.source.chunk_s)
        self._recent.forget_seen(found.visible_in)
        self._flight = Flight(part=part, chunk=found, mark=self.write_mark(), repaired=read.repaired)
        faults.reach("dump.after_mark")

    def _drop_reads(self, part: Part) -> None:
        """Let nobody wait for what is being read of a part; its mark will come back and mean nothing."""
        if self._read is not None and self._read.part is part:
            self._read.is_dropped = True
        if self._flight is not None and self._flight.part is part:
            self._flight = None

    def _move_cursor(self, part: Part, flight: Flight, settled: Settled) -> None:
        if settled.missing and self.requests is not None:
            # Before the group that counts them: a crash in between only has them noted twice.
            first = part.cursor.next_key if flight.repaired is None else len(part.keys) + part.cursor.missing
            self.requests.note_missing(part.dump_id, first=first, keys=settled.missing)
        if flight.repaired is not None:
            self._set_cursor(part, part.cursor.repaired(flight.repaired, settled))
        elif part.keys:
            asked = part.next_keys()
            self._set_cursor(part, part.cursor.read_keys(len(asked), settled, asked=len(part.keys)))
        else:
            self._set_cursor(
                part, part.cursor.advanced(settled, last_key=flight.chunk.last_key, scanned=flight.chunk.scanned)
            )

    def _set_cursor(self, part: Part, cursor: TableDump) -> None:
        part.cursor = cursor
        self.is_unsaved = True
        dump = self._asked.get(part.dump_id)
        if part.is_done:
            self._forget_unread(part.table)
            if dump is not None and dump.is_complete:
                self._end(dump, Ending.DONE)
        if self.on_progress is not None:
            self.on_progress(
                DumpProgress(
                    table=part.table,
                    rows=cursor.rows,
                    estimated_rows=cursor.estimated_rows,
                    is_done=part.is_done,
                    dump_id=part.dump_id,
                )
            )

    # What was streamed.

    def _recall(self, tables: set[TableName], running: Running) -> None:
        """Take what the log has of tables and a snapshot may not see yet; in the order of their commits."""
        found: list[ChangeBatch] = []
        if running.oldest_began_at is not None:
            for group in self._groups_since(running.oldest_began_at, running.visible_in.oldest_running):
                # Their strays are in the stored progress already.
                found += [batch for batch in reversed(group.batches) if batch.schema.name in tables]
        for table in tables:
            self._recent.forget_table(table)
        for batch in reversed(found):
            self._recent.remember(batch)
        if self._read is None and self._flight is None:
            self._recent.forget_seen(running.visible_in)
        if self._recent.byte_count > HELD_BYTES:
            self._let_go()

    def _let_go(self) -> None:
        """Stop holding changes that no snapshot sees yet: reads on their tables wait until one does."""
        tables = self._recent.let_go()
        for read in (self._read, self._flight):
            if read is not None and read.part.table in tables:
                self._drop_reads(read.part)
        logger.info("dumps wait for changes to become visible", tables=[str(table) for table in tables])

    def _forget_unread(self, table: TableName) -> None:
        if not any(part.table == table and part.is_owed for part in self._parts()):
            self._recent.forget_table(table)

    def _groups_since(self, began_at: datetime, oldest_running: int) -> Iterator[StoredGroup]:
        """Groups that may hold a transaction which still runs, newest first."""
        for header in self.reader.headers_backwards():
            if header.max_committed_at is not None and header.max_committed_at + CLOCK_MARGIN < began_at:
                return
            if header.max_txid is not None and header.max_txid >= oldest_running:
                yield from islice(self.reader.read(after_sequence=header.sequence - 1, max_changes=1), 1)

    def _parts(self) -> Iterator[Part]:
        yield from self._initial.values()
        for dump in self._asked.values():
            if dump.ending is None:
                yield from dump.parts.values()

    def _part(
        self, dump_id: str, table: TableName, stored: Mapping[str, Any] | None, request: DumpRequest | None = None
    ) -> Part:
        return Part(
            dump_id=dump_id,
            table=table,
            cursor=TableDump.from_json(stored) if stored is not None else TableDump(),
            pace=Pace.first(most_rows=self.source.chunk_rows),
            keys=request.keys if request else (),
            where=request.where if request else None,
        )

    def _is_time(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._looked_at.get(what, -math.inf) < every_s:
            return False
        self._looked_at[what] = now
        return True
