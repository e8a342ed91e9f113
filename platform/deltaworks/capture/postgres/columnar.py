"""Collects received bytes into slices: whole transactions, one Arrow batch per table and shape.

    bytes ──► ReceiveBuffer ──scan──► changes (offsets) ──group──► Shape.build ──► Slice

Python runs per slice, per table in it, and per message that is no row: descriptions of tables,
truncates, marks. It neither reads a socket nor asks the server; what a table looks like comes from
`Relations.describe`. A transaction that has not ended, or outgrows the buffer, waits in a `Spill` and
comes out at its commit as a run of slices.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.buffer import FIRST_BYTES, ReceiveBuffer
from deltaworks.capture.postgres.clock import from_epoch_us
from deltaworks.capture.postgres.compiled import Longs, i64
from deltaworks.capture.postgres.lines import Lines
from deltaworks.capture.postgres.logical_messages import OUR_PREFIX
from deltaworks.capture.postgres.pgoutput import (
    LogicalMessage,
    MalformedMessageError,
    Message,
    Relation,
    StreamAbort,
    StreamCommit,
    StreamMessage,
    StreamStart,
    Truncate,
    decode,
)
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.postgres.replay import Replay
from deltaworks.capture.postgres.report import lsn_of, reported, undecodable
from deltaworks.capture.postgres.shape import UnreadableRowError
from deltaworks.capture.postgres.spill import Spill
from deltaworks.capture.source import Slice
from deltaworks.change import MESSAGE, TRUNCATE, ChangeBatch
from deltaworks.position import START, Lsn

MARK_PREFIX = f"{OUR_PREFIX}mark"
"""The prefix of our marks in the WAL; messages that are not ours are changes like any other."""

MOST_MESSAGE_BYTES = 1 << 30
"""No message of the server is larger: it builds them in memory that it allots in pieces below 1 GiB."""

_COMMIT_FORM = struct.Struct(">xBQQq")
_FOREIGN_KINDS = b"ENScC"
"""What else a server may send in a stream: errors, notices, settings, and the two ends of a stream."""
_FOREIGN_BYTES = 4096
"""What is kept of bytes that begin like no message."""


@dataclass(slots=True, kw_only=True)
class SliceBuilder:
    """Takes bytes in the order of the WAL and gives slices of whole transactions. Not thread-safe.

    Fill `buffer`, then `read`; `take` when something asks for it.
    """

    relations: Relations
    position: Lsn = START
    """Everything committed at or before it was read."""
    nearby_xid: int = 0
    """A 64-bit transaction id less than 2^31 transactions away from the next one."""
    reports: Path | None = None
    """The folder that keeps the bytes of a malformed message; they hold row data."""
    buffer: ReceiveBuffer = field(default_factory=ReceiveBuffer)
    mark: str | None = None
    is_complete: bool = False
    """Whether the slice must be taken before more can be read."""
    is_foreign: bool = False
    """Whether the next frame is no replication data but the end of the stream, an error or a notice."""
    _taken_up_to: Lsn = field(init=False)
    """The position of the last slice."""
    _lines: Lines = field(init=False)
    _state: Longs = field(init=False)
    """That of the lines."""
    spill_folder: Path | None = None
    """Where transactions wait that are too large for memory; the system's own folder when left out."""
    pending_mark: str | None = None
    """The first mark of the transaction that is being read."""
    _alone_count: int = 0
    """Messages since the last `take` that stand outside of any transaction."""
    _spills: dict[int, Spill] = field(default_factory=dict)
    """Streamed transactions by id."""
    _spill: Spill | None = None
    """The one that arrives now."""
    _replay: Replay | None = None
    _replaced: dict[int, Relation] = field(default_factory=dict)
    _replaced_in: int = -1
    """Descriptions that the transaction with this commit position found and replaced."""

    def __post_init__(self) -> None:
        self._taken_up_to = self.position
        self._lines = Lines.at(self.position.value, nearby_xid=self.nearby_xid)
        self._state = self._lines.state

    @property
    def change_count(self) -> int:
        """Changes of whole transactions since the last `take`."""
        return int(self._state[scan.CLOSED])

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun and not ended."""
        return bool(self._state[scan.IN_TRANSACTION])

    @property
    def is_status_wanted(self) -> bool:
        """Whether the server asked for a status since the last `note_status`."""
        return bool(self._state[scan.REPLY])

    def note_status(self) -> None:
        """Note that the server has got a status."""
        self._state[scan.REPLY] = 0

    def read(self, max_changes: int) -> None:
        """Go through what was received, up to the end of a slice.

        Raises:
            MalformedMessageError: it does not follow the protocol, or does not fit what came before.
        """
        state = self._state
        state[scan.MAX_CHANGES] = max_changes
        self.is_complete |= self.change_count >= max_changes
        while not (self.is_complete or self.is_foreign):
            if self._spill is not None:
                if self._keep(self._spill) == scan.WANT:
                    break
                continue
            why = self._scan()
            if why == scan.WANT:
                break
            self._handle(why)
        if state[scan.STOP] - state[scan.AT] > MOST_MESSAGE_BYTES:
            raise self._undecodable()
        self.position = Lsn(int(state[scan.POSITION]))
        if not state[scan.COUNT]:
            self._release()

    def make_room(self) -> None:
        """Let the buffer take more; where only taking the slice can, it is complete."""
        if self.buffer.room:
            return
        if self.change_count:
            self.is_complete = True
            return
        self._release()
        if not self.buffer.room and self.buffer.is_large and self._state[scan.COUNT]:
            self._spill_open()
        self.buffer.grow(1)

    def take(self, *, is_awaited: bool = False) -> Slice:
        """All whole transactions since the last call, or the next part of a large one; see `Slice.is_partial`."""
        if self._replay is not None:
            return self._take_replayed(self._replay, is_awaited=is_awaited)
        state = self._state
        count = self.change_count
        taken = Slice(
            batches=tuple(self._batches(count)) if count else (),
            position=self.position,
            # The open transaction's line is not in use before it ends.
            transaction_count=int(state[scan.TRANSACTIONS]) - self._alone_count,
            mark=self.mark,
            mark_position=self.position if self.mark is not None else None,
            mark_committed_at=from_epoch_us(int(state[scan.COMMITTED_AT_US])) if self.mark is not None else None,
            is_awaited=is_awaited,
        )
        self._taken_up_to = taken.position
        self._alone_count = 0
        self.mark = None
        self.is_complete = False
        self._release()
        return taken

    def close(self) -> None:
        """Give back what transactions that have not ended hold on disk."""
        for spill in (*self._spills.values(), *([self._spill] if self._spill else [])):
            spill.close()
        if self._replay is not None:
            self._replay.close()

    def next_frame(self) -> tuple[bytes, bytes] | None:
        """Kind and body of a frame that is no replication data, once it is whole.

        Raises:
            MalformedMessageError: it is of no kind that has a place in a stream.
        """
        start, end = int(self._state[scan.AT]), self.buffer.end
        head = bytes(self.buffer.data[start : start + 5])
        if head[0] not in _FOREIGN_KINDS:
            self._state[scan.STOP] = min(end, start + _FOREIGN_BYTES)
            raise self._reported(
                f"cannot read the stream after {self.position}: a message of kind {head[:1].decode('latin-1')!r} "
                "has no place in it"
            )
        stop = start + 1 + int.from_bytes(head[1:], "big")
        if len(head) < 5 or stop > end:
            return None
        body = bytes(self.buffer.data[start + 5 : stop])
        self._state[scan.AT] = stop
        self.is_foreign = False
        return head[:1], body

    @property
    def kept_count(self) -> int:
        """Changes of a kept transaction since the last `take_kept`."""
        return int(self._state[scan.COUNT])

    def begin_kept(self, *, has_xid: bool, transaction: tuple[int, int, int]) -> None:
        """Read nothing but the messages of one transaction whose end is known: (commit, txid, committed_at_us)."""
        self._state[scan.IN_TRANSACTION], self._state[scan.HAS_XID] = 1, has_xid
        self._lines.transactions[0] = transaction

    def scan_kept(self) -> None:
        """Go through all that is in the buffer, whole frames of one transaction."""
        while (why := self._scan()) != scan.WANT:
            self._handle(why)

    def take_kept(self) -> tuple[ChangeBatch, ...]:
        """The changes of the kept transaction that were read since the last call."""
        count = self.kept_count
        batches = tuple(self._batches(count)) if count else ()
        self._state[scan.CLOSED] = count
        self._release()
        return batches

    def _scan(self) -> int:
        buffer, relations, lines = self.buffer, self.relations, self._lines
        return scan.scan(
            buffer.data, buffer.end, lines.state, relations.ids, relations.slots, lines.changes, lines.transactions
        )

    def _handle(self, why: int) -> None:
        if why == scan.FULL:
            self.is_complete = True
            if self._state[scan.MARKED]:
                self.mark, self.pending_mark = self.pending_mark, None
                self._state[scan.MARKED] = 0
        elif why == scan.ROOM:
            self._lines.grow()
        elif why == scan.CONTROL:
            self._control()
        elif why == scan.FOREIGN:
            self.is_foreign = True
        else:
            raise self._malformed()

    def _keep(self, spill: Spill) -> int:
        """Move what arrived for a transaction that is kept into its file; why that stopped."""
        state, buffer = self._state, self.buffer
        start = int(state[scan.AT])
        why = scan.keep(buffer.data, buffer.end, state)
        spill.write(buffer.data[start : state[scan.AT]])
        if why == scan.ROOM:
            spill.note_part(int(state[scan.XID]))
        elif why == scan.CONTROL:
            self._control_kept(spill)
        elif why == scan.FOREIGN:
            self.is_foreign = True
        elif why == scan.MALFORMED:
            raise self._malformed()
        return why

    def _control_kept(self, spill: Spill) -> None:
        """Look at a message that is not kept: descriptions, and where a streamed or spilled transaction ends."""
        state = self._state
        data = self._frame()[scan.MESSAGE :]
        if data[:1] == b"R":
            message = self._decoded()
            if isinstance(message, Relation):
                spill.note_relation(message)
        elif data[:1] == b"E":
            self._spill = None
            state[scan.HAS_XID] = 0
        elif data[:1] == b"C" and len(data) == _COMMIT_FORM.size:
            _flags, commit_lsn, end_lsn, committed_at = _COMMIT_FORM.unpack(data)
            if spill.has_xid or commit_lsn != state[scan.BEGUN_LSN]:
                raise self._malformed()
            self._spill = None
            self._begin_replay(spill, end_lsn, committed_at)
        elif data[:1] not in {b"O", b"Y"}:
            raise self._malformed()
        state[scan.AT] = state[scan.STOP]

    def _spill_open(self) -> None:
        """Move the open transaction, which outgrew the buffer, into a file."""
        state = self._state
        spill = Spill(xid=int(state[scan.XID]), has_xid=False, folder=self.spill_folder)
        if self._replaced_in == state[scan.BEGUN_LSN]:
            for relation in self._replaced.values():
                spill.note_relation(relation)
        # Changes of no other transaction are left, so its first one is where the buffer begins.
        spill.write(self.buffer.data[: state[scan.AT]])
        state[scan.COUNT] = state[scan.ORDINAL] = 0
        self._spill = spill
        self._release()
        # The rest of the transaction only passes through, and reading it back takes memory of its own.
        self.buffer.shrink(to_bytes=FIRST_BYTES)

    def _stream_start(self, message: StreamStart) -> None:
        if message.xid not in self._spills:
            self._spills[message.xid] = Spill(xid=message.xid, has_xid=True, folder=self.spill_folder)
        self._spill = self._spills[message.xid]
        self._state[scan.HAS_XID] = 1
        # No part has this id, so the first message notes its own.
        self._state[scan.XID] = -1

    def _stream_abort(self, message: StreamAbort) -> None:
        spill = self._spills.get(message.xid)
        if spill is None:
            return
        if message.subxid == message.xid:
            self._spills.pop(message.xid).close()
        else:
            spill.cut(message.subxid)

    def _stream_commit(self, message: StreamCommit) -> None:
        spill = self._spills.pop(message.xid, None)
        if spill is None:
            spill = Spill(xid=message.xid, has_xid=True, folder=self.spill_folder)
        self._begin_replay(spill, message.end_lsn, message.committed_at_us)

    def _begin_replay(self, spill: Spill, end_lsn: int, committed_at: int) -> None:
        state = self._state
        txid = scan.widened(spill.xid, int(state[scan.NEARBY_XID]))
        state[scan.NEARBY_XID] = max(state[scan.NEARBY_XID], txid)
        state[scan.IN_TRANSACTION] = 0
        committed_at_us = committed_at + scan.POSTGRES_EPOCH_US
        inner = SliceBuilder(relations=self.relations, position=self.position, reports=self.reports)
        self._replay = Replay(inner, spill, commit=end_lsn, txid=txid, committed_at_us=committed_at_us)
        self.is_complete = True

    def _take_replayed(self, replay: Replay, *, is_awaited: bool) -> Slice:
        state = self._state
        batches, is_last = replay.next_batches(int(state[scan.MAX_CHANGES]))
        if is_last:
            self._replay, self.is_complete = None, False
            state[scan.POSITION], state[scan.COMMITTED_AT_US] = replay.commit, replay.committed_at_us
            self.position, self.mark = Lsn(replay.commit), replay.mark
        taken = Slice(
            batches=batches,
            # Keep-alives may have moved the position since, but a part that is forgotten must not have moved anything.
            position=self.position if is_last else self._taken_up_to,
            transaction_count=int(is_last and replay.has_changes),
            mark=self.mark,
            mark_position=self.position if self.mark is not None else None,
            mark_committed_at=from_epoch_us(replay.committed_at_us) if self.mark is not None else None,
            is_awaited=is_awaited and is_last,
            is_partial=not is_last,
        )
        self._taken_up_to = taken.position
        self.mark = None
        return taken

    def _release(self) -> None:
        """Let go of bytes and changes that are done with; those of an open transaction move to the front."""
        self.buffer.drop(self._lines.drop_closed())
        self.buffer.shrink()

    def _control(self) -> None:
        """Look at a message that is no row."""
        state = self._state
        message = self._decoded()
        if isinstance(message, StreamCommit) and self.change_count:
            # What was committed before it leaves first, under the position before it.
            self.is_complete = True
            return
        action = _ACTIONS.get(type(message))
        if action is not None:
            action(self, message)
        state[scan.AT] = state[scan.STOP]

    def _decoded(self) -> Message | StreamMessage:
        frame = self._frame()
        data = frame[scan.MESSAGE :]
        if self._state[scan.HAS_XID]:
            data = data[:1] + data[5:]
        try:
            return decode(data, lsn=lsn_of(frame).value)
        except MalformedMessageError as error:
            raise self._reported(str(error)) from error

    def _relation(self, message: Relation) -> None:
        state = self._state
        before = self.relations.known(message.id)
        if before is not None and state[scan.COUNT] > state[scan.CLOSED]:
            # Changes of this transaction refer to the description before; should they be spilled, it must be known.
            if self._replaced_in != state[scan.BEGUN_LSN]:
                self._replaced_in, self._replaced = int(state[scan.BEGUN_LSN]), {}
            self._replaced.setdefault(message.id, before)
        self.relations.learn(message)

    def _truncate(self, message: Truncate) -> None:
        for relation_id in message.relation_ids:
            slot = self.relations.slot(relation_id)
            if slot == scan.NOT_CAPTURED:
                continue
            if slot == scan.UNKNOWN or not self.in_transaction:
                raise self._unplaced(relation_id)
            self._lines.add(slot, TRUNCATE)

    def _logical_message(self, message: LogicalMessage) -> None:
        if not message.prefix.startswith(OUR_PREFIX):
            if self.in_transaction:
                self._add_message()
            else:
                self._add_message_alone(message)
        # One outside of a transaction comes out of order, so it marks nothing.
        elif message.transactional and message.prefix == MARK_PREFIX and self.pending_mark is None:
            try:
                self.pending_mark = message.content.decode()
            except UnicodeDecodeError as error:
                raise self._undecodable() from error
            self._state[scan.MARKED] = 1

    def _add_message(self) -> None:
        # Behind the kind, and the transaction's id where there is one.
        body = int(self._state[scan.AT]) + scan.MESSAGE + 1 + 4 * int(self._state[scan.HAS_XID])
        self._lines.add(self.relations.message_slot, MESSAGE, new=body)

    def _add_message_alone(self, message: LogicalMessage) -> None:
        """Take a message that stands outside of any transaction, as a transaction of its own without an id."""
        state = self._state
        state[scan.ORDINAL] = 0
        self._lines.grow()
        clock_us = int(i64(self.buffer.data, int(state[scan.AT]) + scan.CLOCK)) + scan.POSTGRES_EPOCH_US
        # A transaction before it may end where its record begins, but none ends inside of that.
        behind = message.lsn + 1
        self._lines.transactions[state[scan.TRANSACTIONS]] = behind, 0, clock_us
        self._add_message()
        state[scan.TRANSACTIONS] += 1
        self._alone_count += 1
        state[scan.CLOSED] = state[scan.COUNT]
        state[scan.POSITION] = max(behind, int(state[scan.POSITION]))
        self.is_complete |= self.change_count >= state[scan.MAX_CHANGES]

    def _batches(self, count: int) -> Iterator[ChangeBatch]:
        """A batch per table and shape, in the order of their first changes."""
        shapes = self.relations.shapes
        order, starts = np.empty(count, np.int64), np.empty(len(shapes) + 1, np.int64)
        scan.group(self._lines.changes, count, len(shapes), order, starts)
        present = np.flatnonzero(np.diff(starts)).tolist()
        for slot in sorted(present, key=lambda slot: int(order[starts[slot]])):
            lines = order[starts[slot] : starts[slot + 1]]
            try:
                yield shapes[slot].build(self.buffer.data, self._lines.changes, lines, self._lines.transactions)
            except UnreadableRowError as error:
                self._state[scan.AT] = self._lines.changes[error.line, scan.FRAME]
                self._state[scan.STOP] = self._lines.changes[error.line, scan.END]
                raise self._undecodable() from error

    def _frame(self) -> bytes:
        """The frame that the scan stopped at, as much of it as has arrived."""
        return bytes(self.buffer.data[self._state[scan.AT] : min(self._state[scan.STOP], self.buffer.end)])

    def _malformed(self) -> MalformedMessageError:
        frame = self._frame()
        data = frame[scan.MESSAGE :]
        kind, relation_id = data[:1], int.from_bytes(data[1:5], "big")
        is_change = kind in {b"I", b"U", b"D"}
        if is_change and (not self.in_transaction or self.relations.slot(relation_id) == scan.UNKNOWN):
            return self._unplaced(relation_id)
        return self._undecodable()

    def _undecodable(self) -> MalformedMessageError:
        return undecodable(self._frame(), self.reports)

    def _unplaced(self, relation_id: int) -> MalformedMessageError:
        return self._reported(
            f"cannot place a change of relation {relation_id} after {self.position}: no description came before it"
        )

    def _reported(self, what: str) -> MalformedMessageError:
        return reported(what, self._frame(), self.reports)


# Each action takes the kind it stands for.
_ACTIONS: dict[type, Callable[[SliceBuilder, Message | StreamMessage], None]] = {
    Relation: SliceBuilder._relation,  # type: ignore[dict-item]
    Truncate: SliceBuilder._truncate,  # type: ignore[dict-item]
    LogicalMessage: SliceBuilder._logical_message,  # type: ignore[dict-item]
    StreamStart: SliceBuilder._stream_start,  # type: ignore[dict-item]
    StreamAbort: SliceBuilder._stream_abort,  # type: ignore[dict-item]
    StreamCommit: SliceBuilder._stream_commit,  # type: ignore[dict-item]
}
