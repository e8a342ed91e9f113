"""Sees a step that does not come back, names it, and ends it.

A thread looks at the stack of the thread that runs the app, some times a second, and costs the steps nothing. A
step's frame that is there at every look for `limit_s` has not returned; an `async` step is on the stack only
while it computes, so one that is there for `blocking_s` keeps every other call from going on. Either is ended after
`end_after_s`; see `stuck`.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import unwrap
from types import CodeType, FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import structlog

from deltaworks.beside import beside
from deltaworks.process import metrics
from deltaworks.process.clock import SYSTEM, Clock
from deltaworks.process.declared import EnrichStep, Step
from deltaworks.process.stuck import Interrupter

LIMIT_S = 10.0
BLOCKING_S = 1.0
_LOOK_EVERY_S = 0.25
_LOOKS_BEFORE_GIVING_UP = 8
"""An interrupted step may have much to close."""

GiveUp = Callable[[FrameType, Step, float], None]
"""Called in the watchdog's thread with a frame that could not be ended, its step, and for how long it has run."""

logger = structlog.get_logger(__name__)


class Watched(Protocol):
    """Whatever has a watchdog."""

    watchdog: "Watchdog"


W = TypeVar("W", bound=Watched)
P = ParamSpec("P")
R = TypeVar("R")


def watched(run: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """Let its watchdog look at the steps while a method runs."""

    @wraps(run)
    def watched(self: W, /, *arguments: P.args, **options: P.kwargs) -> R:
        with self.watchdog.watching():
            return run(self, *arguments, **options)

    return watched


class Watchdog:
    """Watches the thread in which `watching` was entered."""

    def __init__(
        self,
        app: str,
        steps: Iterable[Step],
        *,
        limit_s: float = LIMIT_S,
        blocking_s: float = BLOCKING_S,
        end_after_s: float | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._app = app
        self._steps: dict[CodeType, Step] = {
            code: step for step in steps for function in _functions_of(step) if (code := _code_of(function)) is not None
        }
        self._limit_s = limit_s
        self._blocking_s = blocking_s
        self._end_after_s = end_after_s
        self._clock = clock
        self._interrupter = Interrupter()
        self._can_interrupt = False
        self._interrupts = 0
        self.give_up: GiveUp | None = None
        """What becomes of a step that cannot be ended; it is only named where this is `None`."""
        self._seen: FrameType | None = None
        self._since = 0.0
        self._tell_at = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the thread that is here until the block ends."""
        watched = threading.get_ident()

        def watch(stop: threading.Event) -> None:
            while not stop.wait(_LOOK_EVERY_S):
                self.look(sys._current_frames().get(watched))

        with self._interrupter.ready() as self._can_interrupt:
            try:
                with beside(watch, name=f"watchdog-{self._app}", daemon=True):
                    yield
            finally:
                self.look(None)

    def look(self, frame: FrameType | None) -> None:
        """Judge one sight of the stack."""
        while frame is not None and frame.f_code not in self._steps:
            frame = frame.f_back
        now = self._clock.monotonic()
        if frame is None or frame is not self._seen:
            if self._seen is not None and self._tell_at > self._since + self._limit_of(self._seen):
                metrics.STUCK.labels(self._app, self._steps[self._seen.f_code].name).set(0)
            self._seen, self._since, self._interrupts = frame, now, 0
            self._tell_at = now + (self._limit_of(frame) if frame is not None else 0)
            return
        if now >= self._tell_at:
            self._tell(frame, now - self._since)
            # Then twice as late each time, so that a step which hangs for a day does not fill the log.
            self._tell_at = now + (now - self._since)
        if self._end_after_s is not None and now - self._since >= self._end_after_s:
            self._end(frame, now - self._since)

    def _end(self, frame: FrameType, seconds: float) -> None:
        self._interrupts += 1
        if self._can_interrupt:
            self._interrupter.interrupt(frame)
        if self.give_up is not None and self._interrupts > (_LOOKS_BEFORE_GIVING_UP if self._can_interrupt else 0):
            self.give_up(frame, self._steps[frame.f_code], seconds)

    def _limit_of(self, frame: FrameType) -> float:
        return self._blocking_s if self._steps[frame.f_code].is_async else self._limit_s

    def _tell(self, frame: FrameType, seconds: float) -> None:
        step = self._steps[frame.f_code]
        metrics.STUCK.labels(self._app, step.name).set(seconds)
        logger.error(
            "step blocks the event loop" if step.is_async else "step does not return",
            app=self._app,
            step=step.name,
            place=step.place,
            line=frame.f_lineno,
            seconds=round(seconds, 1),
        )


def _functions_of(step: Step) -> Iterator[Callable[..., Any]]:
    yield step.function
    if isinstance(step, EnrichStep):
        yield step.key


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    return getattr(unwrap(function), "__code__", None)
