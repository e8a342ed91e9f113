"""Make the engine fail at a named step of this process; `deltaworks.faults` has the other half."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from deltaworks.faults import arm, arm_handover, disarm


def kill_at(name: str, *, after: int = 0) -> None:
    """Kill this process with SIGKILL when it reaches the step for the `after + 1`-th time.

    For a child process of a test: nothing is flushed, closed or released, as in a real crash.
    """
    passes_left = after

    def kill() -> None:
        nonlocal passes_left
        if passes_left == 0:
            _die()
        passes_left -= 1

    arm(name, kill)


@contextmanager
def fail_at(name: str, error: BaseException, *, times: int = 1) -> Iterator[None]:
    """Raise `error` the first `times` times the step is reached; every step is disarmed on leaving."""
    failures_left = times

    def fail() -> None:
        nonlocal failures_left
        if failures_left > 0:
            failures_left -= 1
            raise error

    arm(name, fail)
    try:
        yield
    finally:
        disarm()


@contextmanager
def lose_at(name: str, change: Callable[[Any], Any]) -> Iterator[None]:  # Any: whatever is handed over there
    """Put `change(value)` in the place of what one hop hands to the next; every step is disarmed on leaving."""
    arm_handover(name, change)
    try:
        yield
    finally:
        disarm()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: SIGKILL cannot be caught")
