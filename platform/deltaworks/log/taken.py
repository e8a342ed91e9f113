"""What a hop took out of a log: the same windows and sketch that anyone can compute from the log again.

    log   ──group 7──group 8──group 9──►
    hop   Taken(after=6, up_to=9, windows, sketch)     stored in the hop's own commit, with what it made of them

A span ends where the hop stands, so it is compared with exactly the groups that the hop has reached: what is on
its way is never missed, whatever a clock says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from deltaworks.capture.proof import WindowSet, change_hashes
from deltaworks.capture.sketch import Sketch
from deltaworks.change import ChangeBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The changes that a hop took of the groups after `after`, up to and with `up_to`."""

    after: int
    up_to: int
    windows: WindowSet = field(default_factory=WindowSet)
    sketch: Sketch = field(default_factory=Sketch)

    @classmethod
    def of(cls, batches: Iterable[ChangeBatch], *, after: int, up_to: int) -> Self:
        """What these batches of those groups come to."""
        hashed = [(batch, change_hashes(batch)) for batch in batches]
        if not hashed:
            return cls(after=after, up_to=up_to)
        sketch = Sketch.of_hashes(np.concatenate([hashes for _, hashes in hashed]))
        return cls(after=after, up_to=up_to, windows=WindowSet.of_hashed(hashed), sketch=sketch)

    @classmethod
    def from_json(cls, stored: Sequence[Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        after, up_to, windows, sketch = stored
        return cls(after=after, up_to=up_to, windows=WindowSet.from_json(windows), sketch=Sketch.from_text(sketch))

    def to_json(self) -> list[Any]:  # Any: JSON values
        """The span as JSON."""
        return [self.after, self.up_to, self.windows.to_json(), self.sketch.to_text()]

    def then(self, other: Self) -> Self:
        """One span of both, where the other follows."""
        return type(self)(
            after=self.after,
            up_to=other.up_to,
            windows=self.windows.merge(other.windows),
            sketch=self.sketch.merge(other.sketch),
        )
