"""The bytes of a replication stream: straight from the socket where nothing encrypts them, through libpq elsewhere.

    SocketWire   socket ──recv_into──► ReceiveBuffer            one system call for thousands of messages
    LibpqWire    socket ──► libpq ──get_copy_data──► ReceiveBuffer   TLS and GSS encryption live in libpq

Both fill the buffer with the same frames. See "Message Formats" in PostgreSQL's documentation.
"""

import os
import select
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import psycopg
from psycopg import errors, pq

from deltaworks.capture.postgres.buffer import RECEIVE_BYTES, ReceiveBuffer
from deltaworks.capture.source import SourceUnreachableError, UndecodableError
from deltaworks.errors import InvariantError

_GSS = b"select 1 from pg_catalog.pg_stat_gssapi where pid = pg_catalog.pg_backend_pid() and encrypted"
_COPY_BOTH, _ERROR, _NOTICE, _SETTING = b"W", b"E", b"N", b"S"
_BROKEN_LOG = {errors.InternalError_.sqlstate, errors.DataCorrupted.sqlstate}
_COPY_DONE, _COMMAND_COMPLETE = b"c", b"C"


class Wire(Protocol):
    """The server's end of a stream. Not thread-safe."""

    def receive(self, buffer: ReceiveBuffer) -> int:
        """Put what has arrived into the buffer; the number of bytes, 0 when nothing has. Never waits.

        Raises:
            SourceUnreachableError: the connection broke, or the server ended the stream.
        """

    def wait(self, seconds: float) -> None:
        """Wait until something has arrived or time is up."""

    def send(self, payload: bytes) -> None:
        """Send a CopyData message; it may leave with the next call when the server does not take it now.

        Raises:
            SourceUnreachableError: the connection broke.
        """

    def close(self) -> None:
        """Let go of the socket; the connection is closed by whoever opened it."""


def start(connection: psycopg.Connection[Any], command: bytes) -> Wire:
    """Send START_REPLICATION; the wire that brings the stream.

    Raises:
        psycopg.Error: the server refuses, or the connection broke.
    """
    if connection.pgconn.ssl_in_use or connection.pgconn.exec_(_GSS).ntuples:
        return LibpqWire.start(connection, command)
    return SocketWire.start(connection, command)


def raise_for(kind: bytes, body: bytes) -> None:
    """Deal with a message that is no CopyData: nothing for a notice, else the end of the stream.

    Raises:
        SourceUnreachableError: the server ended the stream; the message has its words.
        UndecodableError: it ended because of what is in its log.
        InvariantError: the message has no place in a stream.
    """
    if kind in {_NOTICE, _SETTING}:
        return
    if kind == _ERROR:
        error = _error(body)
        raise _ended(error.diag.message_primary or "", state=error.sqlstate)
    if kind in {_COPY_DONE, _COMMAND_COMPLETE}:
        raise _ended("it shuts down")
    raise InvariantError(f"cannot read a message of kind {kind.decode('latin-1')!r} in the stream; report this")


@dataclass(slots=True)
class LibpqWire:
    """Reads messages one by one through libpq."""

    connection: psycopg.Connection[Any]  # Any: it never returns rows
    _poll: Any = field(init=False, repr=False)  # Any: the type of select.poll() has no name

    def __post_init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(self.connection.pgconn.socket, select.POLLIN)

    @classmethod
    def start(cls, connection: psycopg.Connection[Any], command: bytes) -> Self:
        """See `start`."""
        result = connection.pgconn.exec_(command)
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise errors.error_from_result(result)
        connection.pgconn.nonblocking = 1
        return cls(connection)

    def receive(self, buffer: ReceiveBuffer) -> int:
        """Put what has arrived into the buffer."""
        pgconn, before, size = self.connection.pgconn, buffer.end, 0
        try:
            pgconn.consume_input()
            while buffer.end - before < RECEIVE_BYTES:
                size, data = pgconn.get_copy_data(1)
                if size <= 0:
                    break
                buffer.append(data)
        except psycopg.Error as error:
            raise broken(error) from error
        if size < 0 and buffer.end == before:
            result = pgconn.get_result()
            said, state = ("", b"") if result is None else _said(result)
            raise _ended(said or "it shuts down", state=state.decode("ascii", "replace"))
        return buffer.end - before

    def wait(self, seconds: float) -> None:
        """Wait until something has arrived or time is up."""
        self._poll.poll(seconds * 1000)

    def send(self, payload: bytes) -> None:
        """Send a CopyData message."""
        try:
            self.connection.pgconn.put_copy_data(payload)
            self.connection.pgconn.flush()
        except psycopg.Error as error:
            raise broken(error) from error

    def close(self) -> None:
        """Nothing: the socket is libpq's."""


@dataclass(slots=True)
class SocketWire:
    """Reads the socket of a connection that libpq opened and has no byte of.

    libpq believes the connection idle: it sent no query after the last one whose answer it has read.
    """

    socket: socket.socket
    _early: bytes = b""
    """What came behind the answer to the command."""
    _unsent: bytes = b""
    _poll: Any = field(init=False, repr=False)  # Any: the type of select.poll() has no name

    def __post_init__(self) -> None:
        self.socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)

    @classmethod
    def start(cls, connection: psycopg.Connection[Any], command: bytes) -> Self:
        """See `start`."""
        wire = cls(socket.socket(fileno=os.dup(connection.pgconn.socket)))
        try:
            wire._begin(command)
        except BaseException:
            wire.close()
            raise
        return wire

    def receive(self, buffer: ReceiveBuffer) -> int:
        """Put what has arrived into the buffer."""
        if self._early:
            early, self._early = self._early, b""
            buffer.grow(len(early))
            buffer.free()[: len(early)] = early
            buffer.received(len(early))
            return len(early)
        try:
            count = self.socket.recv_into(buffer.free())
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise broken(error) from error
        if count == 0:
            raise SourceUnreachableError("the replication connection broke: the server closed it")
        buffer.received(count)
        return count

    def wait(self, seconds: float) -> None:
        """Wait until something has arrived or time is up."""
        self._flush()
        self._poll.poll(seconds * 1000)

    def send(self, payload: bytes) -> None:
        """Send a CopyData message."""
        self._unsent += b"d" + (4 + len(payload)).to_bytes(4, "big") + payload
        self._flush()

    def close(self) -> None:
        """Let go of the socket."""
        with suppress(SourceUnreachableError):
            self._flush()
        self.socket.close()

    def _begin(self, command: bytes) -> None:
        self._unsent = b"Q" + (5 + len(command)).to_bytes(4, "big") + command + b"\0"
        arrived = b""
        while True:
            self._flush()
            self._poll.poll()
            try:
                piece = self.socket.recv(65_536)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise psycopg.OperationalError(str(error)) from error
            if not piece:
                raise psycopg.OperationalError("the server closed the connection")
            arrived += piece
            while (message := _first_message(arrived)) is not None:
                kind, body, arrived = message
                if kind == _COPY_BOTH:
                    self._early = arrived
                    return
                if kind == _ERROR:
                    raise _error(body)

    def _flush(self) -> None:
        if not self._unsent:
            return
        try:
            sent = self.socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            # Never wait for room here: a server that waits for us to read would wait forever.
            return
        except OSError as error:
            raise broken(error) from error
        self._unsent = self._unsent[sent:]


def broken(error: Exception) -> SourceUnreachableError:
    """The error for a connection that broke."""
    return SourceUnreachableError(f"the replication connection broke: {error}".strip())


def _ended(said: str, *, state: str | None = None) -> SourceUnreachableError:
    kind = UndecodableError if state in _BROKEN_LOG else SourceUnreachableError
    return kind(f"the server ended the stream: {said}; open it again at the last durable position")


def _said(result: pq.abc.PGresult) -> tuple[str, bytes]:
    """The words and the SQLSTATE of a result."""
    said = result.error_message.decode("utf-8", "replace").strip()
    return said, result.error_field(pq.DiagnosticField.SQLSTATE) or b""


def _first_message(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Kind and body of the first message, and what follows it; `None` when it is not whole."""
    end = 1 + int.from_bytes(data[1:5], "big")
    return (data[:1], data[5:end], data[end:]) if 5 <= end <= len(data) else None


def _error(body: bytes) -> psycopg.Error:
    """The driver's error for an ErrorResponse: fields of a letter and a text each."""
    fields = {part[0]: part[1:] for part in body.split(b"\0") if part}
    said = fields.get(ord("M"), b"").decode("utf-8", "replace")
    state = fields.get(ord("C"), b"").decode("ascii", "replace")
    try:
        kind = errors.lookup(state)
    except KeyError:
        kind = psycopg.DatabaseError
    return kind(said, info=dict(fields))
