"""The clock that limits, breakers and caches go by, so that a test can move it by hand."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and waits. `deltaworks.testing.clock` has one that a test moves."""

    def time(self) -> float:
        """Seconds since 1970; may be set back by the machine's administrator."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Return when that many seconds of `monotonic` have passed."""


class SystemClock:
    """The machine's own."""

    def time(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait in the running event loop."""
        await asyncio.sleep(seconds)


SYSTEM = SystemClock()
