"""Drives the dumps of a source beside its stream: one chunk at a time, settled at its mark.

    advance: read a chunk, write its mark ──► stream … ──► settle at the mark ──► reads for the group

What is decided is decided in `capture.dump`; this module keeps the cursors, asks the source, and
remembers what was streamed. Its progress is stored with the group that reached it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.capture.dump import DumpState, Recent, TableDump, TextKey, settle, strays
from deltaworks.capture.source import Chunk, Slice, Source
from deltaworks.change import ChangeBatch
from deltaworks.errors import InvariantError
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.schema import TableName

REPAIR_KEYS = 500
"""Keys of one repair read; a statement takes 65,535 parameters at most."""

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


OnProgress = Callable[[DumpProgress], None]


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A chunk that was read and waits for its mark; `keys` are set for a repair read."""

    table: TableName
    chunk: Chunk
    mark: str
    keys: tuple[TextKey, ...] | None


@dataclass(slots=True, kw_only=True)
class Dumping:
    """All dumps of a source during one connection's life. Not thread-safe.

    `write_mark` commits a mark into the source's log and returns its id.
    """

    source: Source
    reader: LogReader
    write_mark: Callable[[], str]
    on_progress: OnProgress | None = None
    is_unsaved: bool = False
    """Whether the cursors moved since they were last stored."""
    _dumps: dict[TableName, TableDump] = field(default_factory=dict)
    _recent: Recent = field(default_factory=Recent)
    _flight: _Flight | None = None
    _fence: int | None = None
    _estimates: dict[TableName, int | None] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether no dump is owed."""
        return self._pending() is None

    @property
    def is_in_flight(self) -> bool:
        """Whether a chunk was read whose mark has not come back."""
        return self._flight is not None

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The cursors, as they are stored in a group's progress."""
        return {"dumps": {str(table): dump.to_json() for table, dump in self._dumps.items()}}

    def load(self, progress: Mapping[str, Any]) -> None:  # Any: JSON values
        """Take up the stored cursors. A table that is new in the configuration waits; one that left is forgotten."""
        stored = progress.get("dumps", {})
        self._dumps = {
            schema.name: TableDump.from_json(stored[str(schema.name)]) if str(schema.name) in stored else TableDump()
            for schema in self.source.tables()
        }

    def recall(self) -> None:
        """Remember what earlier runs logged and a new snapshot may still not see."""
        if self._pending() is None:
            return
        running = self.source.running()
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

    def remember(self, batch: ChangeBatch) -> None:
        """Take note of changes that were streamed."""
        dump = self._dumps.get(batch.schema.name)
        if dump is None or dump.state is DumpState.DONE:
            return
        self._recent.remember(batch)
        moved = frozenset(strays(batch))
        if moved:
            self._dumps[batch.schema.name] = replace(dump, strays=dump.strays | moved)

    def advance(self) -> bool:
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
            chunk = self.source.rows(table, keys=keys)
        else:
            if dump.up_to_key is None:
                raise InvariantError(f"cannot go on with the dump of {table}: its progress has no last key")
            chunk = self.source.chunk(
                table, after_key=dump.after_key, up_to_key=dump.up_to_key, limit=self.source.chunk_rows
            )
        faults.reach("dump.after_select")
        self._recent.forget_seen(chunk.visible_in)
        self._flight = _Flight(table=table, chunk=chunk, mark=self.write_mark(), keys=keys)
        faults.reach("dump.after_mark")
        return False

    def is_table_done(self, table: TableName) -> bool:
        """Whether the log has every row of a table, by reads or by changes."""
        dump = self._dumps.get(table)
        return dump is not None and dump.state is DumpState.DONE

    def restart(self, table: TableName, reason: str) -> None:
        """Dump a table anew, from its first row: the log missed what changed in it. Its other dump, if any, ends."""
        if table not in self._dumps:
            return
        logger.warning("a table is dumped again", source=self.source.name, table=str(table), reason=reason)
        if self._flight is not None and self._flight.table == table:
            # Its mark will come back and find nobody who waits for it.
            self._flight = None
        self._recent.forget_table(table)
        # A new fence: what was streamed before now and is not visible yet ends before the first chunk is read.
        self._fence = None
        self._dumps[table] = TableDump()
        self.is_unsaved = True

    def settle(self, taken: Slice) -> tuple[ChangeBatch, ...]:
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

    def _pending(self) -> TableName | None:
        """The table whose dump is next, in configured order."""
        return next((table for table, dump in self._dumps.items() if dump.state is not DumpState.DONE), None)

    def _groups_since(self, began_at: datetime, oldest_running: int) -> Iterator[StoredGroup]:
        """Groups that may hold a transaction which still runs, newest first."""
        for header in self.reader.headers_backwards():
            if header.max_committed_at is not None and header.max_committed_at + CLOCK_MARGIN < began_at:
                return
            if header.max_txid is not None and header.max_txid >= oldest_running:
                yield from islice(self.reader.read(after_sequence=header.sequence - 1, max_changes=1), 1)

    def _is_fence_passed(self) -> bool:
        """Whether every transaction that ran when this run began has ended.

        One that wrote to a table before its changes were captured is in no stream. Once it has
        ended, every snapshot sees it, and the dump reads what it wrote.
        """
        running = self.source.running()
        self._recent.forget_seen(running.visible_in)
        if self._fence is None:
            self._fence = running.next_txid
        return running.visible_in.oldest_running >= self._fence

    def _begin(self, table: TableName, dump: TableDump) -> None:
        last_key = self.source.last_key(table)
        self._set_dump(table, dump.begun(last_key))
        logger.info("the dump of a table begins", source=self.source.name, table=str(table))

    def _set_dump(self, table: TableName, dump: TableDump) -> None:
        self._dumps[table] = dump
        self.is_unsaved = True
        is_done = dump.state is DumpState.DONE
        if is_done:
            self._recent.forget_table(table)
        if self.on_progress is not None:
            if table not in self._estimates:
                self._estimates[table] = self.source.estimated_rows(table)
            self.on_progress(
                DumpProgress(table=table, rows=dump.rows, estimated_rows=self._estimates[table], is_done=is_done)
            )
