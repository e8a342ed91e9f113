"""Collects received bytes into slices: whole transactions, one Arrow batch per table and shape.

    bytes ──► ReceiveBuffer ──scan──► changes (offsets) ──group──► Shape.build ──► Slice

Python runs per slice, per table in it, and per message that is no row: descriptions of tables,
truncates, marks. Pure: it neither reads a socket nor asks the server; what a table looks like
comes from `Relations.describe`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.buffer import ReceiveBuffer
from deltaworks.capture.postgres.compiled import Longs
from deltaworks.capture.postgres.pgoutput import (
    LogicalMessage,
    MalformedMessageError,
    Message,
    Relation,
    StreamMessage,
    Truncate,
    decode,
)
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.postgres.shape import UnreadableRowError
from deltaworks.capture.source import Slice
from deltaworks.change import TRUNCATE, ChangeBatch
from deltaworks.position import START, Lsn

MARK_PREFIX = "deltaworks.mark"
"""The prefix of our marks in the WAL; other messages are not ours and are passed over."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_LINES = 4096
_LSN_AT = slice(6, 14)


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
    _state: Longs = field(init=False)
    _changes: Longs = field(init=False)
    _transactions: Longs = field(init=False)
    _pending_mark: str | None = None

    def __post_init__(self) -> None:
        self._state = scan.new_state(position=self.position.value, nearby_xid=self.nearby_xid)
        self._changes = np.empty((_FIRST_LINES, scan.CHANGE_SIZE), np.int64)
        self._transactions = np.empty((_FIRST_LINES, scan.TRANSACTION_SIZE), np.int64)

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
        state, buffer, relations = self._state, self.buffer, self.relations
        state[scan.MAX_CHANGES] = max_changes
        self.is_complete |= self.change_count >= max_changes
        while not (self.is_complete or self.is_foreign):
            why = scan.scan(
                buffer.data, buffer.end, state, relations.ids, relations.slots, self._changes, self._transactions
            )
            if why == scan.WANT:
                break
            self._handle(why)
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
        self.buffer.grow(1)

    def take(self, *, is_awaited: bool = False) -> Slice:
        """All whole transactions since the last call."""
        state = self._state
        count = self.change_count
        taken = Slice(
            batches=tuple(self._batches(count)) if count else (),
            position=self.position,
            transaction_count=self._transaction_count(),
            mark=self.mark,
            mark_position=self.position if self.mark is not None else None,
            mark_committed_at=from_epoch_us(int(state[scan.COMMITTED_AT_US])) if self.mark is not None else None,
            is_awaited=is_awaited,
        )
        self.mark = None
        self.is_complete = False
        self._release()
        return taken

    def next_frame(self) -> tuple[bytes, bytes] | None:
        """Kind and body of a frame that is no replication data, once it is whole."""
        start, end = int(self._state[scan.AT]), self.buffer.end
        head = bytes(self.buffer.data[start : start + 5])
        stop = start + 1 + int.from_bytes(head[1:], "big")
        if len(head) < 5 or stop > end:
            return None
        body = bytes(self.buffer.data[start + 5 : stop])
        self._state[scan.AT] = stop
        self.is_foreign = False
        return head[:1], body

    def _handle(self, why: int) -> None:
        if why == scan.FULL:
            self.is_complete = True
            if self._state[scan.MARKED]:
                self.mark, self._pending_mark = self._pending_mark, None
                self._state[scan.MARKED] = 0
        elif why == scan.ROOM:
            self._grow()
        elif why == scan.CONTROL:
            self._control()
        elif why == scan.FOREIGN:
            self.is_foreign = True
        else:
            raise self._malformed()

    def _transaction_count(self) -> int:
        # The open transaction's line is not in use before it ends.
        return int(self._state[scan.TRANSACTIONS])

    def _grow(self) -> None:
        if self._state[scan.COUNT] == len(self._changes):
            self._changes = _doubled(self._changes)
        if self._state[scan.TRANSACTIONS] == len(self._transactions):
            self._transactions = _doubled(self._transactions)

    def _release(self) -> None:
        """Let go of bytes and changes that are done with; those of an open transaction move to the front."""
        state = self._state
        closed, count = int(state[scan.CLOSED]), int(state[scan.COUNT])
        start = int(self._changes[closed, scan.FRAME]) if count > closed else int(state[scan.AT])
        left = self._changes[: count - closed]
        left[:] = self._changes[closed:count]
        left[:, scan.TRANSACTION] = 0
        for column in (scan.NEW, scan.OLD):
            # An offset of 0 stands for no row.
            left[:, column] = np.where(left[:, column] == 0, 0, left[:, column] - start)
        for column in (scan.END, scan.FRAME):
            left[:, column] -= start
        self.buffer.drop(start)
        state[scan.AT] -= start
        state[scan.STOP] = max(0, state[scan.STOP] - start)
        state[scan.COUNT], state[scan.CLOSED], state[scan.TRANSACTIONS] = count - closed, 0, 0
        self.buffer.shrink()

    def _control(self) -> None:
        """Look at a message that is no row."""
        state = self._state
        message = self._decoded()
        action = _ACTIONS.get(type(message))
        if action is not None:
            action(self, message)
        state[scan.AT] = state[scan.STOP]

    def _decoded(self) -> Message | StreamMessage:
        frame = self._frame()
        try:
            return decode(frame[scan.MESSAGE :], lsn=_lsn(frame).value)
        except MalformedMessageError as error:
            raise self._reported(str(error)) from error

    def _relation(self, message: Relation) -> None:
        self.relations.learn(message)

    def _truncate(self, message: Truncate) -> None:
        state = self._state
        for relation_id in message.relation_ids:
            slot = self.relations.slot(relation_id)
            if slot == scan.NOT_CAPTURED:
                continue
            if slot == scan.UNKNOWN or not self.in_transaction:
                raise self._unplaced(relation_id)
            self._grow()
            line = self._changes[state[scan.COUNT]]
            line[[scan.SLOT, scan.OP, scan.PLACE, scan.TRANSACTION, scan.NEW, scan.OLD, scan.END, scan.FRAME]] = (
                slot,
                ord(TRUNCATE),
                state[scan.ORDINAL],
                state[scan.TRANSACTIONS],
                0,
                0,
                state[scan.STOP],
                state[scan.AT],
            )
            state[scan.COUNT] += 1
            state[scan.ORDINAL] += 1

    def _logical_message(self, message: LogicalMessage) -> None:
        # One outside of a transaction comes out of order, so it marks nothing.
        if message.transactional and message.prefix == MARK_PREFIX and self._pending_mark is None:
            self._pending_mark = message.content.decode()
            self._state[scan.MARKED] = 1

    def _batches(self, count: int) -> Iterator[ChangeBatch]:
        """A batch per table and shape, in the order of their first changes."""
        shapes = self.relations.shapes
        order, starts = np.empty(count, np.int64), np.empty(len(shapes) + 1, np.int64)
        scan.group(self._changes, count, len(shapes), order, starts)
        present = np.flatnonzero(np.diff(starts)).tolist()
        for slot in sorted(present, key=lambda slot: int(order[starts[slot]])):
            lines = order[starts[slot] : starts[slot + 1]]
            try:
                yield shapes[slot].build(self.buffer.data, self._changes, lines, self._transactions)
            except UnreadableRowError as error:
                self._state[scan.AT] = self._changes[error.line, scan.FRAME]
                self._state[scan.STOP] = self._changes[error.line, scan.END]
                raise self._undecodable() from error

    def _frame(self) -> bytes:
        """The frame that the scan stopped at."""
        return bytes(self.buffer.data[self._state[scan.AT] : self._state[scan.STOP]])

    def _malformed(self) -> MalformedMessageError:
        frame = self._frame()
        data = frame[scan.MESSAGE :]
        kind, relation_id = data[:1], int.from_bytes(data[1:5], "big")
        is_change = kind in {b"I", b"U", b"D"}
        if is_change and (not self.in_transaction or self.relations.slot(relation_id) == scan.UNKNOWN):
            return self._unplaced(relation_id)
        return self._undecodable()

    def _undecodable(self) -> MalformedMessageError:
        frame = self._frame()
        data = frame[scan.MESSAGE :]
        return self._reported(
            f"cannot decode the {data[:1].decode('latin-1')!r} message of {len(data)} bytes at {_lsn(frame)}: "
            "a marker, a size or its place in the stream is wrong"
        )

    def _unplaced(self, relation_id: int) -> MalformedMessageError:
        return self._reported(
            f"cannot place a change of relation {relation_id} after {self.position}: no description came before it"
        )

    def _reported(self, what: str) -> MalformedMessageError:
        """The error, its bytes saved beside it."""
        if self.reports is None:
            return MalformedMessageError(what)
        frame = self._frame()
        path = self.reports / f"message-{_lsn(frame).value:016X}.bin"
        self.reports.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(frame)
        return MalformedMessageError(f"{what}; its bytes are in {path}: keep them for a report, they hold row data")


def from_epoch_us(microseconds: int) -> datetime:
    """A time given in microseconds since 1970, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def _lsn(frame: bytes) -> Lsn:
    """Where in the WAL the message of a frame is."""
    return Lsn(int.from_bytes(frame[_LSN_AT], "big"))


def _doubled(lines: Longs) -> Longs:
    larger: npt.NDArray[np.int64] = np.empty((2 * len(lines), lines.shape[1]), np.int64)
    larger[: len(lines)] = lines
    return larger


_ACTIONS: dict[
    type, Callable[[SliceBuilder, Message | StreamMessage], None]
] = {  # each action takes the kind it stands for
    Relation: SliceBuilder._relation,  # type: ignore[dict-item]
    Truncate: SliceBuilder._truncate,  # type: ignore[dict-item]
    LogicalMessage: SliceBuilder._logical_message,  # type: ignore[dict-item]
}
