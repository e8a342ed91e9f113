"""A step that does not return is ended: its change becomes a dead letter, and other keys go on.

    watchdog ── after `step_limit_s` ──► signal ──► the step raises StepStuckError ──► dead letter
                                           │ it goes on: code that no signal reaches
                                           └► stuck.json, synced ──► the service ends ──► its next life:
                                                                     the change is a dead letter, untried

Python runs signal handlers in the main thread alone, and returns to them from loops, sleeps and socket reads. What a
thread of its own, or a C library that does not come back, keeps from them, only the end of the process ends.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

from deltaworks.position import Lsn, Version
from deltaworks.process.fold import Key
from deltaworks.request_folder import write_json

Holder = Callable[[Mapping[str, Any]], Any]
"""From the variables of a caller to the entity or turn that it calls a step for; `None` before there is any."""
STUCK_FILE = "stuck.json"
"""In the folder of the app."""
EXIT_STUCK = 75
"""The exit code of a service that ended because of a step; sysexits.h has it as a failure that may pass."""
# The Go runtime chose it for the same use: nobody else sends it without a socket that asked for it, and a process
# that does not handle it does not notice.
_SIGNAL = signal.SIGURG


class StepStuckError(BaseException):
    """Raised in a step that did not return in time; no `Exception`, so that a step does not take it for its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A step that could not be ended in its process, and the change it was given."""

    step: str
    place: str
    seconds: float
    key: Key
    position: int
    ordinal: int

    @property
    def version(self) -> Version:
        """That of the change."""
        return Version(Lsn(self.position), self.ordinal)

    def is_of(self, step: str, key: Key, version: Version) -> bool:
        """Whether it is this change, in this step."""
        return (self.step, self.key, self.version) == (step, key, version)

    @property
    def error(self) -> str:
        """What its letter says."""
        return f"did not return in {self.seconds:.3g} s at {self.place}, and its process was ended"

    def write(self, folder: Path) -> None:
        """Keep it for the next life of the app; on disk when this returns."""
        write_json(folder / STUCK_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What the life before left; `None` where it left nothing."""
        try:
            return cls(**json.loads((folder / STUCK_FILE).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None


class Interrupter:
    """Raises `StepStuckError` in a frame of the main thread; only where that frame still runs, never behind it."""

    def __init__(self) -> None:
        self._condemned: FrameType | None = None

    @contextmanager
    def ready(self) -> Iterator[bool]:
        """Take the signal for the time of the block; gives whether this thread can be interrupted."""
        if threading.current_thread() is not threading.main_thread():
            yield False
            return
        before = signal.signal(_SIGNAL, self._raise)
        try:
            yield True
        finally:
            self._condemned = None
            signal.signal(_SIGNAL, before)

    def interrupt(self, frame: FrameType) -> None:
        """Raise in this frame, which the main thread runs; called from another thread."""
        self._condemned = frame
        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)

    def _raise(self, _: int, frame: FrameType | None) -> None:
        condemned, self._condemned = self._condemned, None
        while frame is not None and frame is not condemned:
            frame = frame.f_back
        # It may have returned between the look and the signal; what runs now is not to blame.
        if frame is not None:
            raise StepStuckError


def change_in(frame: FrameType | None, holders: Mapping[CodeType, Holder]) -> tuple[Key, Version] | None:
    """The change that a step's frame was called for: `holders` has how to find it among a caller's variables."""
    while frame is not None and frame.f_code not in holders:
        frame = frame.f_back
    if frame is None:
        return None
    held = holders[frame.f_code](frame.f_locals)
    return (held.entity if hasattr(held, "entity") else held.key, held.version) if held is not None else None
