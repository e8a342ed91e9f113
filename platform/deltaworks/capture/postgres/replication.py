"""The driver of a replication connection: sockets and clocks, no decoding and no Arrow.

    server ──CopyData──► 'w' WAL data      1 + 8 start + 8 end of WAL + 8 clock, then pgoutput
                         'k' keep-alive    1 + 8 end of WAL + 8 clock + 1 reply wanted
    server ◄─CopyData─── 'r' status        1 + 8 written + 8 flushed + 8 applied + 8 clock + 1

The end of WAL in a keep-alive is a position that the server has read, and everything committed
before it was sent already; so between transactions it is as good as a commit.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psycopg

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.scan import POSTGRES_EPOCH_US
from deltaworks.capture.postgres.wire import Wire, raise_for
from deltaworks.capture.source import Slice, SourceUnreachableError
from deltaworks.position import START, Lsn

LINGER_S = 0.015
"""How long a slice waits for more once it has something, on a busy source: one sync serves them all."""

BUSY_FOR_S = 0.01
"""How long the server counts as busy after something arrived."""

NAP_S = 0.01
"""How long a reader that has caught up with a busy server sleeps before it looks again.

A reader that waits in the kernel is woken by nearly every message, and one that looks again at once gets a few
messages each time; both take the server's time too. With naps the server sends up to twice as much, and the reader
takes a quarter of the time of a processor or less.
"""

PLENTY_BYTES = 64 << 10
"""Who gets less than this at once has caught up with the server."""

CONFIRM_EVERY_S = 0.5
"""How often the server learns of newly durable positions, when it does not ask."""

STATUS_EVERY_S = 5.0
"""How often the server hears from us; it gives up after `wal_sender_timeout`, 60 s by default."""

_STATUS_FORM = struct.Struct(">cQQQqB")


@dataclass(slots=True, kw_only=True)
class PostgresStream:
    """A `ChangeStream` over one replication connection that is already in COPY mode.

    Not thread-safe.
    """

    connection: psycopg.Connection[Any]  # Any: it never returns rows
    wire: Wire
    builder: SliceBuilder
    durable: Lsn
    clock: Callable[[], float] = time.monotonic
    _status_sent_at: float = 0.0
    _durable_sent: Lsn = START
    _busy_until: float = 0.0
    _reported: Lsn = START
    _arrived_at: float = -1.0

    def __post_init__(self) -> None:
        self._reported = self.builder.position

    def next(self, *, timeout_s: float, max_changes: int = 16_384) -> Slice | None:
        """The next slice, or `None`; see `ChangeStream`."""
        builder = self.builder
        deadline = self.clock() + timeout_s
        linger_until: float | None = None
        while True:
            arrived = self._receive(max_changes)
            self._keep_alive()
            now = self.clock()
            if arrived:
                self._arrived_at = now
            if builder.is_complete:
                return self._take()
            if arrived >= PLENTY_BYTES and now < deadline:
                continue
            if builder.change_count and not builder.in_transaction:
                if linger_until is None:
                    # After a pause nobody else is on the way, so the first transaction goes at once.
                    linger_until = min(now + LINGER_S, deadline) if now < self._busy_until else now
                if now >= linger_until:
                    return self._take()
            elif builder.is_status_wanted and self._has_news() and not builder.in_transaction:
                return self._take()
            elif now >= deadline:
                return self._take() if self._has_news() else None
            until = deadline if linger_until is None else linger_until
            self._wait(min(max(until - now, 0.0), CONFIRM_EVERY_S), now)

    def confirm(self, position: Lsn) -> None:
        """Tell the server that it may forget what was committed at or before `position`."""
        self.durable = max(self.durable, position)
        if self.builder.is_status_wanted or self._is_status_due():
            self._send_status()

    def close(self) -> None:
        """Confirm what is durable and leave."""
        try:
            self._send_status()
        except SourceUnreachableError:
            # Whoever confirms too little gets it again; nothing is lost.
            pass
        finally:
            self.builder.close()
            self.wire.close()
            self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, seconds: float, now: float) -> None:
        if now - self._arrived_at < BUSY_FOR_S:
            time.sleep(min(seconds, NAP_S))
        else:
            self.wire.wait(seconds)

    def _receive(self, max_changes: int) -> int:
        """Read what has arrived, up to the end of the slice; the number of bytes."""
        builder = self.builder
        # What the last slice left over comes first.
        builder.read(max_changes)
        builder.make_room()
        if builder.is_complete:
            return 0
        count = self.wire.receive(builder.buffer)
        if count:
            builder.read(max_changes)
        while builder.is_foreign and (message := builder.next_frame()) is not None:
            raise_for(*message)
            builder.read(max_changes)
        return count

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
        self.wire.send(_STATUS_FORM.pack(b"r", written, flushed, flushed, clock_us, 0))
        self._status_sent_at = self.clock()
        self._durable_sent = self.durable
        self.builder.note_status()
