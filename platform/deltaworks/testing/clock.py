"""A clock that stands still until a test moves it."""

import asyncio
import heapq
from itertools import count


class HandClock:
    """A `deltaworks.process.clock.Clock` moved by `advance`; who sleeps wakes when it gets there.

    >>> clock = HandClock(at=100.0)
    >>> clock.advance(2.5)
    >>> clock.time()
    102.5

    Sleeps belong to one event loop; `advance` may be called from any thread.
    """

    def __init__(self, *, at: float = 1_750_000_000.0) -> None:
        self._now = at
        self._order = count()
        self._sleeping: list[tuple[float, int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def time(self) -> float:
        """Seconds since 1970."""
        return self._now

    def monotonic(self) -> float:
        """The same seconds: this clock never goes back."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Return once the clock was moved that far."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._sleeping, (self._now + seconds, next(self._order), loop, woken))
        await woken

    @property
    def sleepers(self) -> int:
        """How many sleep now; a test waits for one before it moves the clock."""
        return sum(not woken.done() for *_, woken in self._sleeping)

    def advance(self, seconds: float) -> None:
        """Move forward and wake whoever's time has come, in the order of their times."""
        if seconds < 0:
            raise ValueError(f"a clock goes forward only, got {seconds!r} s")
        self._now += seconds
        while self._sleeping and self._sleeping[0][0] <= self._now:
            *_, loop, woken = heapq.heappop(self._sleeping)
            loop.call_soon_threadsafe(_wake, woken)


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)
