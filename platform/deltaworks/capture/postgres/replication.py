"""The driver of a replication connection: sockets and clocks, no decoding and no Arrow.

    server ──CopyData──► 'w' WAL data      1 + 8 start + 8 end of WAL + 8 clock, then pgoutput
                         'k' keep-alive    1 + 8 end of WAL + 8 clock + 1 reply wanted
    server ◄─CopyData─── 'r' status        1 + 8 written + 8 flushed + 8 applied + 8 clock + 1

The end of WAL in a keep-alive is a position that the server has read, and everything committed
before it was sent already; so between transactions it is as good as a commit.
"""

import select
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import pq

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.scan import POSTGRES_EPOCH_US
from deltaworks.capture.source import Slice, SourceUnreachableError
from deltaworks.position import START, Lsn

LINGER_S = 0.015
"""How long a slice waits for more once it has something, on a busy source: one sync serves them all."""

CONFIRM_EVERY_S = 0.5
"""How often the server learns of newly durable positions, when it does not ask."""

STATUS_EVERY_S = 5.0
"""How often the server hears from us; it gives up after `wal_sender_timeout`, 60 s by default."""

MESSAGES_AT_ONCE = 1024
"""Messages that are taken from libpq before the builder looks at them."""

_STATUS_FORM = struct.Struct(">cQQQqB")


@dataclass(slots=True, kw_only=True)
class PostgresStream:
    """A `ChangeStream` over one replication connection that is already in COPY mode.

    One transaction is held in memory whole. Not thread-safe.
    """

    connection: psycopg.Connection[Any]  # Any: it never returns rows
    builder: SliceBuilder
    durable: Lsn
    clock: Callable[[], float] = time.monotonic
    _status_sent_at: float = 0.0
    _durable_sent: Lsn = START
    _busy_until: float = 0.0
    _reported: Lsn = START
    _poll: Any = field(init=False, repr=False)  # Any: the type of select.poll() has no name

    def __post_init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(self.connection.pgconn.socket, select.POLLIN)
        self._reported = self.builder.position

    def next(self, *, timeout_s: float, max_changes: int = 16_384) -> Slice | None:
        """The next slice, or `None`; see `ChangeStream`."""
        now = self.clock()
        deadline = now + timeout_s
        linger_until: float | None = None
        while True:
            self._read_buffered(max_changes)
            self._keep_alive()
            if self.builder.is_complete:
                return self._take()
            now = self.clock()
            if self.builder.change_count and not self.builder.in_transaction:
                if linger_until is None:
                    # After a pause nobody else is on the way, so the first transaction goes at once.
                    linger_until = now + LINGER_S if now < self._busy_until else now
                if now >= linger_until:
                    return self._take()
            elif self.builder.is_status_wanted and self._has_news() and not self.builder.in_transaction:
                return self._take()
            elif now >= deadline and self.builder.in_transaction:
                return None
            until = deadline if linger_until is None else linger_until
            if not self._wait(until - now) and self.clock() >= until:
                return self._take() if self._has_news() and not self.builder.in_transaction else None

    def confirm(self, position: Lsn) -> None:
        """Tell the server that it may forget what was committed at or before `position`."""
        self.durable = max(self.durable, position)
        if self.builder.is_status_wanted or self._is_status_due():
            self._send_status()

    def close(self) -> None:
        """Confirm what is durable and leave."""
        try:
            if self.connection.pgconn.status == pq.ConnStatus.OK:
                self._send_status()
        except SourceUnreachableError:
            # Whoever confirms too little gets it again; nothing is lost.
            pass
        finally:
            self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_buffered(self, max_changes: int) -> None:
        """Read everything that has arrived, up to the end of the slice."""
        builder, get = self.builder, self.connection.pgconn.get_copy_data
        while True:
            builder.read(max_changes)
            if builder.is_complete:
                return
            for _ in range(MESSAGES_AT_ONCE):
                try:
                    size, data = get(1)
                except psycopg.Error as error:
                    raise _broken(error) from error
                if size <= 0:
                    break
                builder.buffer.append(data)
            builder.read(max_changes)
            if size < 0:
                raise self._ended()
            if size == 0 or builder.is_complete:
                return

    def _has_news(self) -> bool:
        return self.builder.change_count > 0 or self.builder.position > self._reported

    def _take(self) -> Slice:
        taken = self.builder.take(is_awaited=self.builder.is_status_wanted)
        self._reported = taken.position
        if taken.batches:
            self._busy_until = self.clock() + 0.05
        return taken

    def _keep_alive(self) -> None:
        # A wanted reply waits for the position to become durable, but not for long: no news is a reply too.
        if self._is_status_due() or (self.builder.is_status_wanted and not self._has_news()):
            self._send_status()

    def _is_status_due(self) -> bool:
        # A status per group would be a system call per group; the server needs it seldom.
        every_s = CONFIRM_EVERY_S if self.durable > self._durable_sent else STATUS_EVERY_S
        return self.clock() - self._status_sent_at >= every_s

    def _send_status(self) -> None:
        clock_us = time.time_ns() // 1000 - POSTGRES_EPOCH_US
        written = max(self.builder.position, self.durable).value
        flushed = self.durable.value
        try:
            self.connection.pgconn.put_copy_data(_STATUS_FORM.pack(b"r", written, flushed, flushed, clock_us, 0))
            self.connection.pgconn.flush()
        except psycopg.Error as error:
            raise _broken(error) from error
        self._status_sent_at = self.clock()
        self._durable_sent = self.durable
        self.builder.note_status()

    def _wait(self, seconds: float) -> bool:
        """Wait until the socket has more; `False` when time is up."""
        step = min(max(seconds, 0.0), CONFIRM_EVERY_S)
        if not self._poll.poll(step * 1000):
            return False
        try:
            self.connection.pgconn.consume_input()
        except psycopg.Error as error:
            raise _broken(error) from error
        return True

    def _ended(self) -> SourceUnreachableError:
        result = self.connection.pgconn.get_result()
        said = result.error_message.decode("utf-8", "replace").strip() if result is not None else ""
        return SourceUnreachableError(
            f"the server ended the stream after {self.builder.position}: {said or 'it shuts down'}; "
            "open it again at the last durable position"
        )


def _broken(error: Exception) -> SourceUnreachableError:
    return SourceUnreachableError(f"the replication connection broke: {error}".strip())
