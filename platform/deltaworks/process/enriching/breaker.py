"""The circuit breaker of an enrichment: a service that keeps failing is left alone for a while.

    CLOSED ── `failures` calls failed in a row ──► OPEN ── `open_s` later ──► HALF_OPEN
      ▲                                              ▲                           │ one call, the probe
      └──────────────── it succeeded ────────────────┴──── it failed ────────────┘

While it is open no call is made: the keys that need one are held until it may close, and that is no attempt of
theirs. While the probe is out the others wait for what it finds. A service's own Retry-After (RFC 9110, section
10.2.3) closes the door in the same way for as long as it says, with or without a breaker.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from deltaworks.process.clock import SYSTEM, Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """Opens after `failures` failed calls in a row, for `open_s` seconds.

    A failed call is one that may work later: no connection, no answer in time, 429, 5xx, an answer that cannot be
    read. A call that the service refuses for what it asks for (another 4xx) shows that the service is there.

    >>> Breaker(failures=50, open_s=10)
    Breaker(failures=50, open_s=10)
    """

    failures: int = 20
    open_s: float = 30.0


class BreakerState(IntEnum):
    """Where a breaker stands; the number is what the metric shows."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Admission(NamedTuple):
    """Leave to make one call, or how long to wait for it. Every leave is handed back to `report` or `abandon`."""

    wait_s: float | None = None
    is_probe: bool = False
    closed_since: int = 0


class Circuit:
    """The breaker of one step as it runs; without a `Breaker` it heeds Retry-After only. One event loop."""

    def __init__(
        self,
        breaker: Breaker | None,
        *,
        clock: Clock = SYSTEM,
        on_move: Callable[[BreakerState], None] = lambda state: None,  # noqa: ARG005 - nobody listens by default
    ) -> None:
        self._breaker = breaker
        self._clock = clock
        self._on_move = on_move
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._opened_at = 0.0
        self._paused_until = float("-inf")
        self._closed_since = 0
        self._probed = asyncio.Event()

    @property
    def state(self) -> BreakerState:
        """Where it stands."""
        return self._state

    async def admit(self) -> Admission:
        """Ask for leave to call; waits while a probe is out."""
        while True:
            now_s = self._clock.monotonic()
            if now_s < self._paused_until:
                return Admission(wait_s=self._paused_until - now_s)
            if self._breaker is None or self._state is BreakerState.CLOSED:
                return Admission(closed_since=self._closed_since)
            if self._state is BreakerState.OPEN:
                wait_s = self._opened_at + self._breaker.open_s - now_s
                if wait_s > 0:
                    return Admission(wait_s=wait_s)
                self._probed = asyncio.Event()
                self._move(BreakerState.HALF_OPEN)
                return Admission(is_probe=True)
            await self._probed.wait()

    def pause(self, seconds: float) -> None:
        """Let no call out for so long: the service asked for it."""
        self._paused_until = max(self._paused_until, self._clock.monotonic() + seconds)

    def report(self, admission: Admission, *, has_failed: bool) -> None:
        """Say how an admitted call ended."""
        if admission.is_probe:
            self._end_probe(has_failed=has_failed)
        elif self._state is BreakerState.CLOSED and admission.closed_since == self._closed_since:
            self._failures = self._failures + 1 if has_failed else 0
            if self._breaker is not None and self._failures >= self._breaker.failures:
                self._open()
        # A call from before it opened says nothing about now.

    def abandon(self, admission: Admission) -> None:
        """Say that an admitted call was given up; the next one is the probe."""
        if admission.is_probe:
            self._move(BreakerState.OPEN)
            self._probed.set()

    def _end_probe(self, *, has_failed: bool) -> None:
        if has_failed:
            self._open()
        else:
            self._failures = 0
            self._closed_since += 1
            self._move(BreakerState.CLOSED)
        self._probed.set()

    def _open(self) -> None:
        self._opened_at = self._clock.monotonic()
        self._move(BreakerState.OPEN)

    def _move(self, state: BreakerState) -> None:
        self._state = state
        self._on_move(state)
