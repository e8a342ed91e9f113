"""What an enrichment remembers of a service's answers, in memory, for a while.

An answer's age counts from the moment its call began, so none is ever older than `seconds`. With a `lookup` table
a change of a row drops the answer of its id; an answer whose call began before the drop never enters after it
(`enrich.py` sees to that). The cache starts empty, so no change made while the app was down can be missed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from deltaworks.process.fold import Key

_NEGATIVE_S = 30.0


class Unknown(Enum):
    """The answer of an id that the service does not know."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN


@dataclass(frozen=True, slots=True)
class Ttl:
    """Keep a service's answers for `seconds`, at most `max_items` of them: the longest unused leave first.

    `negative_s`: how long it is kept that the service does not know an id; 0 for not at all. Left out, it is 30 s
    or `seconds`, whichever is shorter.

    >>> Ttl(600).unknown_s, Ttl(10).unknown_s, Ttl(600, negative_s=0).unknown_s
    (30.0, 10, 0)
    """

    seconds: float
    max_items: int = 100_000
    negative_s: float | None = None

    @property
    def unknown_s(self) -> float:
        """How long an unknown id is kept."""
        return min(self.seconds, _NEGATIVE_S) if self.negative_s is None else self.negative_s


class AnswerCache:
    """The answers of one step by id. Deciding only: it is told the time. One thread."""

    def __init__(self, ttl: Ttl) -> None:
        self._ttl = ttl
        self._entries: OrderedDict[Key, tuple[float, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, id_: Key, *, now_s: float) -> Any:  # Any: what the service answered
        """The answer, `UNKNOWN` where it is kept that there is none, or `None` where nothing is kept."""
        entry = self._entries.get(id_)
        if entry is None:
            return None
        if entry[0] <= now_s:
            del self._entries[id_]
            return None
        self._entries.move_to_end(id_)
        return entry[1]

    def put(self, answers: Mapping[Key, Any], unknown: Iterable[Key], *, asked_at_s: float) -> None:
        """Keep what a call begun at `asked_at_s` found, and which ids it did not know."""
        expires_s = asked_at_s + self._ttl.seconds
        for id_, answer in answers.items():
            self._entries[id_] = (expires_s, answer)
            self._entries.move_to_end(id_)
        if self._ttl.unknown_s > 0:
            expires_s = asked_at_s + self._ttl.unknown_s
            for id_ in unknown:
                self._entries[id_] = (expires_s, UNKNOWN)
                self._entries.move_to_end(id_)
        while len(self._entries) > self._ttl.max_items:
            self._entries.popitem(last=False)

    def drop(self, ids: Iterable[Key]) -> None:
        """Forget what is kept of these ids."""
        for id_ in ids:
            self._entries.pop(id_, None)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
