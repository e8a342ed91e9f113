"""One worker at a time: run as the service, or wait for the service that runs."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import pyarrow as pa
import structlog

from deltaworks.errors import DeltaworksError, RetryableError

SERVICE_PATIENCE_S = 60.0
"""How long to wait for a running service. It needs milliseconds, so past this it hangs."""
LEASE_RETRY_S = 0.5
"""How often a standby asks for the lease: a takeover takes at most this long after the other has ended."""
_LOOK_EVERY_S = 0.02

T = TypeVar("T")

logger = structlog.get_logger(__name__)


class ServiceSlowError(RetryableError):
    """A service holds the lease but does not get to where it should be."""


class Closeable(Protocol):
    """Something that is let go of with `close`."""

    def close(self) -> None:
        """Let go."""


C = TypeVar("C", bound=Closeable)


def warm_up() -> None:
    """Do now what would hold up changes later, once all code is loaded.

    Arrow imports pandas for its first array. And Python's collector would look at all that is loaded again and again,
    for 50 ms each time, with everything else standing still.
    """
    pa.array([0])
    gc.collect()
    gc.freeze()


@contextmanager
def leased(
    take: Callable[[], C], refusal: type[DeltaworksError] | tuple[type[DeltaworksError], ...], *, stop: threading.Event
) -> Iterator[C | None]:
    """What `take` gives, as soon as it no longer raises `refusal`; `None` when `stop` came first."""
    held: C | None = None
    is_waiting = False
    while held is None and not stop.is_set():
        try:
            held = take()
        except refusal as error:
            if not is_waiting:
                logger.info("standing by for the lease", reason=str(error))
            is_waiting = True
            stop.wait(LEASE_RETRY_S)
    try:
        yield held
    finally:
        if held is not None:
            held.close()


def taken_unless_done(
    take: Callable[[], T],
    refusal: type[DeltaworksError],
    *,
    is_done: Callable[[], bool],
    what: str,
    patience_s: float = SERVICE_PATIENCE_S,
) -> T | None:
    """What `take` gives, as soon as it no longer raises `refusal`; `None` when what was to be done is done before.

    Whoever has it may be a service that does it, or a run like this one that ends before it gets there.

    Raises:
        ServiceSlowError: neither within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return take()
        except refusal:
            next_try = time.monotonic() + LEASE_RETRY_S
        while time.monotonic() < next_try:
            if is_done():
                return None
            if time.monotonic() > deadline:
                raise ServiceSlowError(
                    f"{what} did not get to now within {patience_s:.0f} s; look at its output, or stop it"
                )
            time.sleep(_LOOK_EVERY_S)
