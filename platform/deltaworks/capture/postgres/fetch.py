"""Runs one SELECT and takes its rows off the socket by columns, with no Python per row.

    Parse Bind Execute(16) Sync ──►      one statement, values as parameters, never inside the text
    ◄── DataRow DataRow DataRow …        taken into one buffer, located by a compiled kernel; a piece of
    Execute(n) Sync, Execute(n) Sync ──► some thousand rows at a time, as `Cells` of each column

The driver's library makes an object for every row. Between two statements it is idle with nothing in
its buffers, so for the length of one statement its socket is read directly, and the last ReadyForQuery
hands it back (protocol version 3, "Extended Query"). Over TLS or GSS the bytes are the library's alone:
it is asked row by row, slower, with the same result.

The first rows tell how large a row is, and how many more fit what may come. Those are asked for some
answers ahead, so that the server never waits; a suspended portal stays until its transaction ends. So a
statement that has more rows than fit costs nothing: the rest is never asked for.

While a piece is turned into Arrow the server fills the socket with the next.
"""

import select
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psycopg
from psycopg import errors, pq

from deltaworks.capture.postgres.catalog import AnyConnection
from deltaworks.capture.postgres.cells import NULL_SIZE, Cells
from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs, compiled, u16, u32
from deltaworks.errors import InvariantError

PIECE_BYTES = 1 << 20
"""Bytes that are received before they are turned into columns; about a processor's second cache."""

PIECE_ROWS = 16_384
"""Rows of a piece at most."""

WAKE_BYTES = 128 << 10
"""Bytes worth waking up for while the server sends on."""

MOMENT_MS = 2
"""How long to wait for as many as that."""

FIRST_ASKED_ROWS = 16
"""Rows that are asked for at first."""

ASKED_BYTES = 1 << 20
"""About how much is asked for at a time after them, or less where little may come."""

ASKED_AHEAD = 4
"""How many answers are awaited at once."""

CANCEL_PATIENCE_S = 5.0

Piece = list[Cells]
"""Some rows, as the cells of each column; valid until the next piece is asked for."""

_COMPLETE, _ERROR, _READY = ord("C"), ord("E"), ord("Z")
_READY_MESSAGE = b"Z\0\0\0\5"
"""ReadyForQuery without its last byte, the state of the transaction."""
_HEADER_BYTES = 5


@dataclass(slots=True)
class Fetch:
    """One statement with its values for `$1`, `$2`, …"""

    statement: bytes
    values: Sequence[str]
    column_count: int
    most_bytes: int
    """About as many bytes of rows come at most. Where rows are suddenly larger than those before, the statement is
    cancelled, and the rows so far are all that come.
    """
    in_binary: Sequence[bool] = ()
    """Which columns come in the server's binary form, over the bare socket only; all others as its text."""
    is_cut: bool = False
    """Whether it was ended so; the transaction around it may have failed then."""
    _received: int = field(default=0, init=False)
    _is_cancelled: bool = field(default=False, init=False)
    _cancelled_at: int = field(default=0, init=False)

    def run(self, connection: AnyConnection) -> Iterator[Piece]:
        """The rows in their order. Take every piece: dropped half way, this closes the connection.

        Raises:
            psycopg.Error: the server refuses, or the connection broke.
        """
        is_complete = False
        try:
            if has_bare_socket(connection):
                yield from _Exchange(self, connection).pieces()
            else:
                yield from _asked_of_the_library(self, connection)
            is_complete = True
        except psycopg.OperationalError:
            raise
        except psycopg.Error:
            # The server said so, after which it waits for the next statement.
            is_complete = True
            raise
        finally:
            if not is_complete:
                # What the server still sends is for nobody.
                connection.close()

    def note(self, byte_count: int, connection: AnyConnection) -> None:
        """Count what was given out; cancel the statement when it is too much."""
        self._received += byte_count
        # Once more when as much again has come: between two requests the server ignores a cancellation.
        if self._received - self._cancelled_at > self.most_bytes:
            self.is_cut = self._is_cancelled = True
            self._cancelled_at = self._received
            connection.cancel_safe(timeout=CANCEL_PATIENCE_S)


class _Exchange:
    """A statement on the bare socket, from the request to the last ReadyForQuery."""

    def __init__(self, fetch: Fetch, connection: AnyConnection) -> None:
        self._fetch = fetch
        self._connection = connection
        self._data: Bytes = np.empty(2 * PIECE_BYTES, np.uint8)
        self._end = 0
        self._starts: Longs = np.empty((fetch.column_count, PIECE_ROWS), np.int64)
        self._sizes: Ints = np.empty((fetch.column_count, PIECE_ROWS), np.int32)
        self._rows = 0
        self._awaited: deque[int] = deque()
        """The rows of every Execute that is not answered, the oldest first."""
        self._is_complete = False
        self._error: psycopg.Error | None = None

    def pieces(self) -> Iterator[Piece]:
        with socket.socket(fileno=socket.dup(self._connection.pgconn.socket)) as wire:
            self._awaited.append(FIRST_ASKED_ROWS)
            _send(wire, _request(self._fetch) + _execute(FIRST_ASKED_ROWS))
            while self._awaited:
                self._receive(wire)
                yield from self._take()
            if self._may_ask():
                with _woken_for(wire, WAKE_BYTES):
                    yield from self._further(wire)
        if self._fetch._is_cancelled:
            return
        if self._error is not None:
            raise self._error
        self._fetch.is_cut = not self._is_complete

    def _further(self, wire: socket.socket) -> Iterator[Piece]:
        """All rows after the first."""
        while True:
            while len(self._awaited) < ASKED_AHEAD and self._may_ask():
                self._awaited.append(self._fitting())
                _send(wire, _execute(self._awaited[-1]))
            if not self._awaited:
                return
            self._receive(wire)
            yield from self._take()

    def _may_ask(self) -> bool:
        """Whether there may be more rows, and room for as many as would be asked for."""
        if self._is_complete or self._error is not None or self._fetch._is_cancelled:
            return False
        # What has come of the oldest answer is counted twice, which errs on the side of fewer rows.
        expected = (sum(self._awaited) + self._fitting()) * self._row_bytes()
        return self._fetch._received + expected <= self._fetch.most_bytes

    def _fitting(self) -> int:
        """How many rows are asked for at a time."""
        asked_bytes = min(ASKED_BYTES, self._fetch.most_bytes // (2 * ASKED_AHEAD))
        return max(1, min(asked_bytes // self._row_bytes(), PIECE_ROWS))

    def _row_bytes(self) -> int:
        return max(1, self._fetch._received // max(1, self._rows))

    def _receive(self, wire: socket.socket) -> None:
        """Wait for bytes, then take what there is, up to a piece."""
        if self._end == len(self._data):
            # One row is larger than the buffer.
            larger = np.empty(2 * len(self._data), np.uint8)
            larger[: self._end] = self._data
            self._data = larger
        free = memoryview(self._data)[self._end :]  # type: ignore[arg-type]  # an array is a buffer, before Python 3.12 unsaid
        taken = 0
        while taken < len(free):
            try:
                count = wire.recv_into(free[taken:])
            except BlockingIOError:
                if taken and self._is_answered(self._end + taken):
                    break
                # Whatever came after a moment is taken, however little: a statement's end has no more behind it.
                if not _is_ready(wire, select.POLLIN, MOMENT_MS):
                    if taken:
                        break
                    with _woken_for(wire, 1):
                        _is_ready(wire, select.POLLIN)
                continue
            if count == 0:
                raise errors.ConnectionFailure("the server closed the connection in the middle of a statement")
            taken += count
            if self._end + taken >= PIECE_BYTES:
                break
        self._end += taken

    def _is_answered(self, end: int) -> bool:
        """Whether the bytes up to `end` look like ReadyForQuery at their end, which nothing follows unless it is
        asked for; a value that happens to look so only ends a piece early.
        """
        return end >= len(_READY_MESSAGE) + 1 and bytes(self._data[end - 6 : end - 1]) == _READY_MESSAGE

    def _take(self) -> Iterator[Piece]:
        """Give out whole rows, heed other messages, keep the rest for later."""
        at = 0
        while self._awaited:
            at, count = _locate(self._data, at, self._end, self._starts, self._sizes)
            if count > 0 and not self._fetch._is_cancelled:
                self._rows += count
                yield [
                    Cells(self._data, starts[:count], sizes[:count])
                    for starts, sizes in zip(self._starts, self._sizes, strict=True)
                ]
            if count == PIECE_ROWS:
                continue
            if count < 0:
                raise InvariantError("cannot read a row: it does not have the columns that were asked for; report this")
            length = self._whole_message(at)
            if length == 0:
                break
            self._heed(self._data[at], bytes(self._data[at + _HEADER_BYTES : at + length]))
            at += length
        # Whole rows count, so that at least one is given out before the statement is cut.
        self._fetch.note(at, self._connection)
        left = self._end - at
        self._data[:left] = self._data[at : self._end]
        self._end = left

    def _whole_message(self, at: int) -> int:
        """The length of the message at `at` with its kind, or 0 when some of it is still to come."""
        if self._end - at < _HEADER_BYTES:
            return 0
        length = 1 + int(u32(self._data, at + 1))
        return length if self._end - at >= length else 0

    def _heed(self, kind: int, body: bytes) -> None:
        # ParseComplete, BindComplete, PortalSuspended, notices and parameter changes ask for nothing.
        if kind == _COMPLETE:
            self._is_complete = True
        elif kind == _ERROR:
            # Those that follow only say that the transaction has failed.
            self._error = self._error or _as_error(body)
        elif kind == _READY:
            self._awaited.popleft()


def _request(fetch: Fetch) -> bytes:
    """Parse and Bind: unnamed, all values as text."""
    values = b"".join(struct.pack("!i", len(value)) + value for value in (text.encode() for text in fetch.values))
    formats = struct.pack(f"!H{len(fetch.in_binary)}h", len(fetch.in_binary), *map(int, fetch.in_binary))
    return b"".join(
        (
            _message(b"P", b"\0" + fetch.statement + b"\0" + struct.pack("!h", 0)),
            _message(b"B", b"\0\0" + struct.pack("!hH", 0, len(fetch.values)) + values + formats),
        )
    )


def _execute(row_count: int) -> bytes:
    """Execute and Sync: at most that many further rows, then ReadyForQuery."""
    return _message(b"E", b"\0" + struct.pack("!i", row_count)) + _message(b"S", b"")


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", 4 + len(body)) + body


def _send(wire: socket.socket, request: bytes) -> None:
    left = memoryview(request)
    while left:
        try:
            left = left[wire.send(left) :]
        except BlockingIOError:
            _is_ready(wire, select.POLLOUT)


@contextmanager
def _woken_for(wire: socket.socket, byte_count: int) -> Iterator[None]:
    """Within, waiting ends when that many bytes are there: the server sends 8 kB at a time."""
    before = wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, byte_count)
    try:
        yield
    finally:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, before)


def _is_ready(wire: socket.socket, what: int, within_ms: int | None = None) -> bool:
    # The library keeps its socket non-blocking, and that mode is shared with our copy of the descriptor.
    waiting = select.poll()
    waiting.register(wire, what)
    # A server that is gone is told by keep-alives; one that works on a statement may be silent for long.
    return bool(waiting.poll(within_ms))


def _as_error(body: bytes) -> psycopg.Error:
    fields = {part[:1]: part[1:].decode(errors="replace") for part in body.split(b"\0") if part}
    try:
        kind = errors.lookup(fields.get(b"C", ""))
    except KeyError:
        kind = psycopg.DatabaseError
    # The primary line has names only; DETAIL lines can hold row data and are left out.
    return kind(fields.get(b"M", "the server gave no reason"))


def has_bare_socket(connection: AnyConnection) -> bool:
    """Whether the connection's bytes can be read directly: they are neither TLS's nor GSS's."""
    library = connection.pgconn
    return not library.ssl_in_use and not getattr(library, "gssapi_in_use", False)


def _asked_of_the_library(fetch: Fetch, connection: AnyConnection) -> Iterator[Piece]:
    """The same pieces, row by row through libpq, of which no more than one row is held there."""
    library = connection.pgconn
    library.send_query_params(fetch.statement, [value.encode() for value in fetch.values])
    library.set_single_row_mode()
    while library.flush():
        select.select([], [library.socket], [])
    piece, error = _Gathered(fetch.column_count), None
    while (result := _next_result(library)) is not None:
        if result.status == pq.ExecStatus.SINGLE_TUPLE:
            if not fetch.is_cut:
                fetch.note(piece.add(result), connection)
            if piece.is_full:
                yield piece.cells()
                piece = _Gathered(fetch.column_count)
        elif result.status == pq.ExecStatus.FATAL_ERROR:
            error = errors.error_from_result(result)
    if piece.rows:
        yield piece.cells()
    if error is not None and not fetch.is_cut:
        raise error


def _next_result(library: pq.abc.PGconn) -> pq.abc.PGresult | None:
    while library.is_busy():
        select.select([library.socket], [], [])
        library.consume_input()
    return library.get_result()


@dataclass(slots=True)
class _Gathered:
    """Rows copied out of results one after the other."""

    column_count: int
    data: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.sizes) // self.column_count if self.column_count else 0

    @property
    def is_full(self) -> bool:
        return len(self.data) >= PIECE_BYTES or self.rows >= PIECE_ROWS

    def add(self, result: pq.abc.PGresult) -> int:
        before = len(self.data)
        for column in range(self.column_count):
            value = result.get_value(0, column)
            self.sizes.append(NULL_SIZE if value is None else len(value))
            self.data += value or b""
        return len(self.data) - before

    def cells(self) -> Piece:
        data = np.frombuffer(self.data, np.uint8) if self.data else np.empty(1, np.uint8)
        sizes = np.array(self.sizes, np.int32)
        starts = np.cumsum(np.maximum(sizes, 0), dtype=np.int64) - np.maximum(sizes, 0)
        return [
            Cells(data, starts[column :: self.column_count].copy(), sizes[column :: self.column_count].copy())
            for column in range(self.column_count)
        ]


@compiled
def _locate(data: Bytes, at: int, end: int, starts: Longs, sizes: Ints) -> tuple[int, int]:
    """Find the cells of the rows from `at` on: where the first message that is no whole row begins, and how
    many rows came before it; -1 rows for one that is malformed.
    """
    columns, capacity = starts.shape
    row = 0
    while row < capacity and at + 5 <= end and data[at] == ord("D"):
        stop = at + 1 + u32(data, at + 1)
        if stop > end:
            break
        if stop < at + 7 or u16(data, at + 5) != columns:
            return at, -1
        place = at + 7
        for column in range(columns):
            if place + 4 > stop:
                return at, -1
            size = u32(data, place)
            place += 4
            starts[column, row] = place
            # A null has the size -1.
            sizes[column, row] = -1 if size == 0xFFFFFFFF else size
            if size != 0xFFFFFFFF:
                place += size
        if place != stop:
            return at, -1
        row += 1
        at = stop
    return at, row
