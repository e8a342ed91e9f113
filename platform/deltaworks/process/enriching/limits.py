"""How much of a service one step may use: calls at once, and calls per second. Both can be changed while it runs."""

import asyncio
from collections import deque
from types import TracebackType

_BURST_S = 0.1
"""How many seconds' worth of calls may come at once after a quiet time: a batch's worth, no storm."""


class TokenBucket:
    """Spreads calls so that `rate_per_s` is kept over any time longer than the burst.

    In any stretch of `s` seconds at most `burst + s * rate_per_s` calls begin, where the burst is a tenth of a
    second's worth and at least one. Pure: it is told the time. (The generic cell rate algorithm, ITU-T I.371.)

    >>> bucket = TokenBucket(2.0)
    >>> [bucket.take(now_s=10.0), bucket.take(now_s=10.0), bucket.take(now_s=11.0)]
    [0.0, 0.5, 0.0]
    """

    def __init__(self, rate_per_s: float) -> None:
        self.rate_per_s = rate_per_s
        self._next_s = float("-inf")

    @property
    def burst(self) -> int:
        """How many calls may begin at one moment."""
        return max(1, int(self.rate_per_s * _BURST_S))

    def wait_s(self, *, now_s: float) -> float:
        """How long the next call would have to wait."""
        return max(0.0, self._next_s - now_s - (self.burst - 1) / self.rate_per_s)

    def take(self, *, now_s: float) -> float:
        """Reserve the next call; the seconds to wait before it."""
        wait_s = self.wait_s(now_s=now_s)
        self._next_s = max(self._next_s, now_s) + 1.0 / self.rate_per_s
        return wait_s


class Gate:
    """Lets `limit` calls in at once, first come, first served. One event loop.

    The limit may be changed at any time: a higher one lets more in at once, with a lower one those inside
    finish first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """How many may be inside."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._let_in()

    async def __aenter__(self) -> None:
        if self._inside < self._limit and not self._waiting:
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # The place may have been given just before: it goes to the next one.
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._inside < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)
