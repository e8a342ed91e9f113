"""What a member of a shared app says of itself whenever it confirms its shares, so that others know how fresh all are.

The group of the members keeps it beside how far each share is, as the last one that had the share said it: whoever asks
needs neither the state of a member nor its machine, and one that is dead still has an age.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

from deltaworks.position import START, Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStanding:
    """How far a member is. `name` is its machine and its process, which said this at `said_at`, seconds since 1970.

    The other fields are as in `Standings`, of the entities of its shares; `dead` counts transitions, too.
    `documents_per_s` is since it last said anything. With `has_left` it was the last, and it ended in good order.
    """

    name: str
    sequence: int = -1
    offset: int = 0
    reached: Lsn = START
    waiting_since: float | None = None
    to_do: int = 0
    held: int = 0
    dead: int = 0
    documents_per_s: float = 0.0
    said_at: float | None = None
    has_left: bool = False

    @classmethod
    def parse(cls, note: str) -> Self | None:
        """What `to_note` wrote; `None` where a member of an older version said nothing.

        What one of a newer version says besides is passed over.
        """
        if not note:
            return None
        values = json.loads(note)
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**known | {"reached": Lsn(values["reached"])})

    def to_note(self) -> str:
        """Some hundred bytes of text."""
        return json.dumps(asdict(self) | {"reached": self.reached.value})

    def and_older(self, other: Self) -> Self:
        """Of two things that a member said at two times: as far as both, and what it said last besides."""
        since = [each.waiting_since for each in (self, other) if each.waiting_since is not None]
        newest = max(self, other, key=lambda each: each.said_at or 0.0)
        return replace(
            newest,
            sequence=min(self.sequence, other.sequence),
            offset=min(self.offset, other.offset),
            reached=min(self.reached, other.reached),
            waiting_since=min(since, default=None),
        )
