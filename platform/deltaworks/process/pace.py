"""When to fold the next changes while sinks flush.

    flush  ├──────────────────────────┤          write, flush …
    work      wait       ├─ fold ─ process ─┤

What is made while sinks flush waits for them, so it may as well be made of newer rows: folding begins when the work
will be done as the flush ends. Where the work takes longer than the flush, it begins at once.
"""

import time
from dataclasses import dataclass, field

_LONGEST_S = 0.25
"""However slow a sink is: whoever asks for something between two cycles waits no longer."""
_WEIGHT = 0.3
"""Of the newest time in the mean; the rest is of those before."""


@dataclass(slots=True)
class Pace:
    """How long a flush and the work for the next one took of late. The flush is timed in a thread of its own."""

    flush_s: float = 0.0
    work_s: float = 0.0
    _working_since: float = field(default=0.0, init=False)

    def delay_s(self, *, flushing_for_s: float) -> float:
        """How long to wait before the work begins.

        >>> Pace(flush_s=0.05, work_s=0.02).delay_s(flushing_for_s=0.01) > 0.015
        True
        >>> Pace(flush_s=0.05, work_s=0.06).delay_s(flushing_for_s=0.01)
        0.0
        """
        return max(0.0, min(_LONGEST_S, self.flush_s - self.work_s - flushing_for_s))

    def begin_work(self) -> None:
        """Take the time at which folding begins."""
        self._working_since = time.monotonic()

    def end_work(self) -> None:
        """Take the time at which documents could be written."""
        self.work_s += _WEIGHT * (time.monotonic() - self._working_since - self.work_s)

    def flushed(self, seconds: float) -> None:
        """Take how long a flush took."""
        self.flush_s += _WEIGHT * (seconds - self.flush_s)
