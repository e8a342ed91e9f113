"""From received bytes to a list of changes: one pass over the frames, no Python per row.

    'd' size │ 'w' start, end of WAL, clock │ 'I' relation 'N' row        one row in `changes`
    'd' size │ 'k' end of WAL, clock, reply │                             moves the position
    'd' size │ 'w' …                        │ 'R', 'T', 'M', 'S', …       stops: Python looks at it

The values stay where they are: a change is a few offsets into the buffer, and `cells` reads whole
columns from there. All state is in one array of numbers, so a scan stops and goes on anywhere.
See "Streaming Replication Protocol" and "Logical Replication Message Formats" in PostgreSQL's
documentation.
"""

import numpy as np

from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs, compiled, i64, u16, u32

POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01 UTC, PostgreSQL's zero of time, in microseconds since 1970."""

WANT, ROOM, FULL, CONTROL, FOREIGN, MALFORMED = range(6)
"""Why a scan stopped: it wants more bytes; more room for changes; the slice is complete; a message that Python
looks at; a frame that is no replication data; bytes that do not follow the protocol."""

AT = 0
"""The next frame; after `CONTROL`, `FOREIGN` and `MALFORMED` the one that the scan stopped at."""
STOP = 1
"""The end of that frame; after `WANT` the end of the frame that is not whole yet, 0 when not known."""
IN_TRANSACTION = 2
HAS_XID = 3
"""Whether messages carry a transaction id, as they do inside of streamed transactions."""
BEGUN_LSN = 4
XID = 5
ORDINAL = 6
"""Changes of captured tables in the open transaction."""
COUNT = 7
"""Rows of `changes` in use."""
CLOSED = 8
"""Those of them that belong to transactions which have ended."""
TRANSACTIONS = 9
"""Rows of `transactions` in use."""
POSITION = 10
COMMITTED_AT_US = 11
"""The commit time of the last transaction."""
MARKED = 12
"""Whether the open transaction, or the last one, holds a mark."""
REPLY = 13
"""Whether the server asked for a status."""
MAX_CHANGES = 14
NEARBY_XID = 15
"""A 64-bit transaction id less than 2^31 away from the next one."""
STATE_SIZE = 16

SLOT, OP, PLACE, TRANSACTION, NEW, OLD, END, FRAME = range(8)
"""Columns of `changes`: table slot, operation, ordinal, row of `transactions`; offsets of the new row, of the old
row (0 for none), of the message's end, and of its frame."""
CHANGE_SIZE = 8

COMMIT, TXID, AT_US = range(3)
"""Columns of `transactions`: end of the commit record, widened id, commit time."""
TRANSACTION_SIZE = 3

UNKNOWN, NOT_CAPTURED = -1, -2
"""What `slot_of` says of a relation that was never described, and of one that is not captured."""

HASH_FACTOR = 2_654_435_761
"""Spreads relation ids over the table of slots (Knuth's multiplicative hash)."""

CLOCK, MESSAGE = 22, 30
"""Where the server's clock and a message start in its frame: 'd' and size, then 'w' and three numbers."""

_DATA, _WAL, _KEEP_ALIVE = ord("d"), ord("w"), ord("k")
_BEGIN, _COMMIT, _INSERT, _UPDATE, _DELETE = ord("B"), ord("C"), ord("I"), ord("U"), ord("D")
_TRUNCATE, _LOGICAL_MESSAGE = ord("T"), ord("M")
_NEW, _KEY, _OLD = ord("N"), ord("K"), ord("O")
_TEXT, _BINARY, _NULL, _UNCHANGED = ord("t"), ord("b"), ord("n"), ord("u")
_CREATED, _UPDATED, _DELETED = ord("c"), ord("u"), ord("d")
_KEEP_ALIVE_SIZE, _WAL_HEADER_SIZE, _BEGIN_SIZE, _COMMIT_SIZE = 18, 25, 21, 26
_XID_SPAN = 1 << 32


@compiled
def slot_of(relation: int, relations: Longs, slots: Ints) -> int:
    """The slot of a relation in an open-addressed table whose length is a power of two; -1 is an empty place."""
    mask = len(relations) - 1
    place = relation * HASH_FACTOR & mask
    while relations[place] != relation:
        if relations[place] < 0:
            return UNKNOWN
        place = (place + 1) & mask
    return slots[place]  # type: ignore[no-any-return]  # numpy's int32 is an int here


@compiled
def end_of_row(data: Bytes, at: int, stop: int) -> int:
    """The end of the row at `at`, or -1 when it does not end before `stop`."""
    if at + 2 > stop:
        return -1
    count = u16(data, at)
    at += 2
    for _ in range(count):
        if at >= stop:
            return -1
        kind = data[at]
        if kind in (_NULL, _UNCHANGED):
            at += 1
        elif kind in (_TEXT, _BINARY) and at + 5 <= stop:
            at += 5 + u32(data, at + 1)
        else:
            return -1
    return at if at <= stop else -1


@compiled
def widened(xid: int, nearby: int) -> int:
    """The 64-bit id nearest to `nearby`; the server never keeps ids 2^31 apart."""
    wide = (nearby & ~(_XID_SPAN - 1)) | xid
    if wide - nearby > _XID_SPAN // 2:
        wide -= _XID_SPAN
    elif nearby - wide > _XID_SPAN // 2:
        wide += _XID_SPAN
    return wide


@compiled
def scan(
    data: Bytes, end: int, state: Longs, relations: Longs, slots: Ints, changes: Longs, transactions: Longs
) -> int:
    """Go on from `state[AT]` up to `end` of what was received; why it stopped."""
    at = state[AT]
    while True:
        state[AT] = at
        state[STOP] = 0
        if at + 5 > end:
            return WANT
        if data[at] != _DATA:
            return FOREIGN
        stop = at + 1 + u32(data, at + 1)
        state[STOP] = stop
        if stop > end:
            return WANT
        body = at + 5
        if stop == body + _KEEP_ALIVE_SIZE and data[body] == _KEEP_ALIVE:
            position = i64(data, body + 1)
            if not state[IN_TRANSACTION] and position > state[POSITION]:
                state[POSITION] = position
            state[REPLY] |= data[body + 17] != 0
            at = stop
            continue
        if stop <= body + _WAL_HEADER_SIZE or data[body] != _WAL:
            return MALFORMED
        kind = data[at + MESSAGE]
        if kind in (_INSERT, _UPDATE, _DELETE):
            if state[COUNT] == len(changes):
                return ROOM
            if not _take_change(data, at, stop, state, relations, slots, changes):
                return MALFORMED
        elif kind == _BEGIN:
            if stop != at + MESSAGE + _BEGIN_SIZE or state[IN_TRANSACTION]:
                return MALFORMED
            state[IN_TRANSACTION] = 1
            state[BEGUN_LSN] = i64(data, at + MESSAGE + 1)
            state[XID] = u32(data, at + MESSAGE + 17)
            state[ORDINAL] = 0
        elif kind == _COMMIT:
            if state[TRANSACTIONS] == len(transactions):
                return ROOM
            if stop != at + MESSAGE + _COMMIT_SIZE or not state[IN_TRANSACTION]:
                return MALFORMED
            if i64(data, at + MESSAGE + 2) != state[BEGUN_LSN]:
                return MALFORMED
            committed_at = i64(data, at + MESSAGE + 18) + POSTGRES_EPOCH_US
            end_transaction(i64(data, at + MESSAGE + 10), committed_at, state, transactions)
            if state[MARKED] or state[CLOSED] >= state[MAX_CHANGES]:
                state[AT] = stop
                return FULL
        else:
            return CONTROL
        at = stop


@compiled
def keep(data: Bytes, end: int, state: Longs) -> int:
    """Walk over whole frames that are kept for later, as `scan` does; why it stopped.

    It stops at a message of another part of the transaction with `ROOM`, so that the caller can note
    where that begins: `state[XID]` is the part's id.
    """
    at = state[AT]
    while True:
        state[AT] = at
        state[STOP] = 0
        if at + 5 > end:
            return WANT
        if data[at] != _DATA:
            return FOREIGN
        stop = at + 1 + u32(data, at + 1)
        state[STOP] = stop
        if stop > end:
            return WANT
        body = at + 5
        if stop == body + _KEEP_ALIVE_SIZE and data[body] == _KEEP_ALIVE:
            position = i64(data, body + 1)
            if not state[IN_TRANSACTION] and position > state[POSITION]:
                state[POSITION] = position
            state[REPLY] |= data[body + 17] != 0
            at = stop
            continue
        if stop <= body + _WAL_HEADER_SIZE or data[body] != _WAL:
            return MALFORMED
        kind = data[at + MESSAGE]
        if kind not in (_INSERT, _UPDATE, _DELETE, _TRUNCATE, _LOGICAL_MESSAGE):
            return CONTROL
        if state[HAS_XID]:
            if stop < at + MESSAGE + 5:
                return MALFORMED
            xid = u32(data, at + MESSAGE + 1)
            if xid != state[XID]:
                state[XID] = xid
                return ROOM
        at = stop


@compiled
def end_transaction(commit: int, committed_at: int, state: Longs, transactions: Longs) -> None:
    """Close the open transaction; `commit` is just behind its commit record, where reading may resume."""
    txid = widened(state[XID], state[NEARBY_XID])
    state[NEARBY_XID] = max(state[NEARBY_XID], txid)
    if state[ORDINAL]:
        row = state[TRANSACTIONS]
        transactions[row, COMMIT] = commit
        transactions[row, TXID] = txid
        transactions[row, AT_US] = committed_at
        state[TRANSACTIONS] = row + 1
    state[CLOSED] = state[COUNT]
    state[IN_TRANSACTION] = 0
    state[POSITION] = commit
    state[COMMITTED_AT_US] = committed_at


@compiled
def _take_change(data: Bytes, at: int, stop: int, state: Longs, relations: Longs, slots: Ints, changes: Longs) -> bool:
    """Note the change in the frame at `at`; `False` when it cannot be one."""
    kind = data[at + MESSAGE]
    body = at + MESSAGE + 1 + 4 * state[HAS_XID]
    if not state[IN_TRANSACTION] or stop < body + 5:
        return False
    slot = slot_of(u32(data, body), relations, slots)
    if slot == NOT_CAPTURED:
        return True
    marker = data[body + 4]
    new = old = 0
    if marker in (_KEY, _OLD) and kind != _INSERT:
        old = body + 5
        if kind == _UPDATE:
            new = end_of_row(data, old, stop)
            if new < 0 or new >= stop or data[new] != _NEW:
                return False
            new += 1
    elif marker == _NEW and kind != _DELETE:
        new = body + 5
    else:
        return False
    if slot == UNKNOWN:
        return False
    row = state[COUNT]
    changes[row, SLOT] = slot
    changes[row, OP] = _CREATED if kind == _INSERT else _UPDATED if kind == _UPDATE else _DELETED
    changes[row, PLACE] = state[ORDINAL]
    changes[row, TRANSACTION] = state[TRANSACTIONS]
    changes[row, NEW] = new
    changes[row, OLD] = old
    changes[row, END] = stop
    changes[row, FRAME] = at
    state[COUNT] = row + 1
    state[ORDINAL] += 1
    return True


@compiled
def group(changes: Longs, count: int, slot_count: int, order: Longs, starts: Longs) -> None:
    """Sort the first `count` changes by slot, keeping their order: `order[starts[s]:starts[s + 1]]` are those of s."""
    starts[:] = 0
    for row in range(count):
        starts[changes[row, SLOT] + 1] += 1
    for slot in range(slot_count):
        starts[slot + 1] += starts[slot]
    next_place = starts.copy()
    for row in range(count):
        slot = changes[row, SLOT]
        order[next_place[slot]] = row
        next_place[slot] += 1


def new_state(*, position: int, nearby_xid: int) -> Longs:
    """The state before the first byte."""
    state = np.zeros(STATE_SIZE, np.int64)
    state[POSITION] = position
    state[NEARBY_XID] = nearby_xid
    return state
