"""The canary: a mark of ours in the source's log at an interval, so that an idle pipe is told apart from a dead one.

    write ──► commit in the source ──► stream ──► group of the log ──► app ──► its sinks are told the position

It is a transactional message (`pg_logical_emit_message`), so it takes the way of a row and needs no table, no right
that a dump does not need, and is in no publication, lake or catalog. Its group moves the slot on an idle database. Each
group names the newest canary at or before it, so whoever knows how far a place is knows how old its canary is.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Self

from deltaworks.capture.source import Slice
from deltaworks.log.change_log import LogReader
from deltaworks.position import Lsn

OVERDUE_AFTER = 3
"""So many intervals without a canary, and the pipe counts as dead."""

_MOST_HEADERS = 5_000
_KEY = "canary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """One that came back. `written_at` and `heard_at` are by the clock of capture; `position` is of its commit.

    `every_s` is the interval at which the next ones are written.
    """

    position: Lsn
    written_at: datetime
    heard_at: datetime
    every_s: float

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> Self | None:  # Any: JSON values
        """The newest canary as of a group with this progress."""
        stored = progress.get(_KEY)
        if stored is None:
            return None
        position, written_at, heard_at, every_s = stored
        return cls(
            position=Lsn(position),
            written_at=datetime.fromtimestamp(written_at, UTC),
            heard_at=datetime.fromtimestamp(heard_at, UTC),
            every_s=every_s,
        )

    def to_json(self) -> list[Any]:  # Any: JSON values
        """The canary as JSON values."""
        times = [round(moment.timestamp(), 3) for moment in (self.written_at, self.heard_at)]
        return [self.position.value, *times, self.every_s]

    @property
    def took_s(self) -> float:
        """From before it was written until it was read from the stream; its group is durable a sync later."""
        return max(0.0, (self.heard_at - self.written_at).total_seconds())

    def age_s(self, now: datetime) -> float:
        """How long ago it was written: whatever was committed before has come as far."""
        return max(0.0, (now - self.written_at).total_seconds())

    @property
    def limit_s(self) -> float:
        """The age beyond which the next ones ought to have come long ago."""
        return OVERDUE_AFTER * self.every_s + self.took_s

    def is_overdue(self, now: datetime) -> bool:
        """Whether the next ones ought to have come long ago."""
        return self.age_s(now) > self.limit_s


@dataclass(slots=True, kw_only=True)
class Canaries:
    """Writes canaries at an interval during one connection's life, and knows the newest. Not thread-safe.

    `write_mark` commits a mark into the source's log and gives its id; without `every_s` none is written.
    """

    every_s: float | None
    write_mark: Callable[[], str]
    clock: Callable[[], float] = time.monotonic
    newest: Canary | None = None
    _under_way: tuple[str, datetime] | None = None
    _written_at: float = field(default=float("-inf"))

    def load(self, progress: Mapping[str, Any]) -> None:  # Any: JSON values
        """Take up what is stored."""
        self.newest = Canary.of(progress)

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """What is stored with each group."""
        return {} if self.newest is None else {_KEY: self.newest.to_json()}

    def advance(self) -> None:
        """Write one when it is time, unless one is still on its way."""
        if self.every_s is None or self._under_way is not None or self.clock() - self._written_at < self.every_s:
            return
        self._written_at, written_at = self.clock(), datetime.now(UTC)
        self._under_way = self.write_mark(), written_at

    def settle(self, taken: Slice) -> bool:
        """Take note of one that comes back with this slice; whether its mark is one."""
        if self._under_way is None or taken.mark != self._under_way[0] or self.every_s is None:
            return False
        _, written_at = self._under_way
        self._under_way = None
        self.newest = Canary(
            position=taken.mark_position or taken.position,
            written_at=written_at,
            heard_at=datetime.now(UTC),
            every_s=self.every_s,
        )
        return True


def canary_at(reader: LogReader, *, sequence: int, reached: Lsn) -> Canary | None:
    """The newest canary that a place has which took group `sequence` and told its sinks of position `reached`.

    `None` where none is in the newest headers: the place is far behind, or there are no canaries.
    """
    for header in islice(reader.headers_backwards(), _MOST_HEADERS):
        if header.sequence <= sequence:
            canary = Canary.of(header.progress)
            if canary is None or canary.position <= reached:
                return canary
    return None
