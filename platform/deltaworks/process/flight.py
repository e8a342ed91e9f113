"""Documents on their way into durable sinks, while the next changes are folded and processed."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from deltaworks.position import Lsn
from deltaworks.process.fold import At, Key
from deltaworks.process.leaving import Leave
from deltaworks.process.pipeline import Outcome
from deltaworks.process.sink import Refusal
from deltaworks.process.waiting import Waiting


@dataclass(slots=True, kw_only=True)
class Flight:
    """What one cycle made of `waiting`, from the write until it is settled.

    `flushing` gives the refusals of the sinks that had any; `None` where nothing was written. `position` is what the
    sinks are told, `read_to` how far the log was folded when this was taken from the state.
    """

    outcome: Outcome
    leave: Leave
    waiting: Sequence[Waiting]
    position: Lsn
    read_to: Lsn
    flushing: Future[list[tuple[str, Sequence[Refusal]]]] | None
    touched: dict[Key, At] = field(default_factory=dict)
    """Entities of this that changed since: they are due again, whatever becomes of what is under way."""
    keys: frozenset[Key] = field(init=False)
    since: float = field(init=False, default_factory=time.monotonic)
    """When it left, on the monotonic clock."""

    def __post_init__(self) -> None:
        self.keys = frozenset(item.key for item in self.waiting)

    def is_durable(self, *, within_s: float) -> bool:
        """Whether the sinks have answered, by then."""
        return self.flushing is None or not wait([self.flushing], timeout=within_s).not_done

    def note(self, touched: Mapping[Key, At]) -> None:
        """Take note of entities that a fold touched."""
        self.touched |= {key: at for key, at in touched.items() if key in self.keys}
