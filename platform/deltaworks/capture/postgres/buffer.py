"""The receive buffer: one piece of memory that is filled at its end, read from its front, and used again."""

from dataclasses import dataclass, field

import numpy as np

from deltaworks.capture.postgres.compiled import Bytes

FIRST_BYTES = 4 << 20
"""Enough for many slices of ordinary rows; memory that was never filled costs nothing."""

MOST_BYTES = 8 << 20
"""The buffer grows to this for a transaction that is larger than it, and past it for one message only."""

RECEIVE_BYTES = 512 << 10
"""The most that is taken from the socket at once; what is not part of the slice is moved, so it stays small."""

_HEADER_BYTES = 5


@dataclass(slots=True)
class ReceiveBuffer:
    """Received bytes from `data[0]` to `data[end]`. Not thread-safe."""

    data: Bytes = field(default_factory=lambda: np.empty(FIRST_BYTES, np.uint8))
    end: int = 0

    @property
    def room(self) -> int:
        """How many bytes it takes before something must be dropped, or it must grow."""
        return len(self.data) - self.end

    @property
    def is_large(self) -> bool:
        """Whether it should not grow any more for the sake of one transaction."""
        return len(self.data) >= MOST_BYTES

    def free(self) -> memoryview:
        """Where to receive into; `received` says how much of it was filled."""
        return self.data.data[self.end : self.end + RECEIVE_BYTES]

    def received(self, count: int) -> None:
        """Note that the first bytes of `free` were filled."""
        self.end += count

    def append(self, payload: memoryview) -> None:
        """Take the payload of one CopyData message, in the frame that it had on the wire."""
        self.grow(_HEADER_BYTES + len(payload))
        frame = self.data.data[self.end :]
        frame[0] = ord("d")
        frame[1:5] = (4 + len(payload)).to_bytes(4, "big")
        frame[5 : 5 + len(payload)] = payload
        self.end += _HEADER_BYTES + len(payload)

    def drop(self, count: int) -> None:
        """Forget the first bytes; the others move to the front."""
        left = self.end - count
        if count and left:
            self.data[:left] = self.data[count : self.end]
        self.end = left

    def grow(self, room: int) -> None:
        """Have room for that many bytes."""
        if self.room < room:
            larger = np.empty(max(2 * len(self.data), self.end + room), np.uint8)
            larger[: self.end] = self.data[: self.end]
            self.data = larger

    def shrink(self, *, to_bytes: int = MOST_BYTES) -> None:
        """Give memory back after something large, once little is in use."""
        if len(self.data) > to_bytes and self.end < FIRST_BYTES:
            self.data = self.data[: self.end].copy()
            self.grow(FIRST_BYTES - self.end)
