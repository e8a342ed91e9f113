"""How many rows the next chunk of a dump asks for: as many as a time budget allows."""

from dataclasses import dataclass, replace
from typing import Self

FIRST_ROWS = 8_000
"""The first chunk of a table; nothing is known of its rows yet."""

FEWEST_ROWS = 100
"""No chunk asks for fewer rows, however slow they come: each costs a transaction and a mark."""

_GROWTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The size of the next chunk; follows what the last one took.

    >>> pace = Pace.first(most_rows=100_000)
    >>> pace.after(row_count=1_000, took_s=0.02, budget_s=0.2).limit
    8000
    >>> pace.after(row_count=1_000, took_s=0.4, budget_s=0.2).limit
    500
    """

    limit: int
    most_rows: int

    @classmethod
    def first(cls, *, most_rows: int) -> Self:
        """The pace before anything was read."""
        return cls(limit=min(most_rows, FIRST_ROWS), most_rows=most_rows)

    def after(self, *, row_count: int, took_s: float, budget_s: float) -> Self:
        """The pace after a chunk of that many rows; grows at most eightfold at a time.

        A chunk that was cut short, because its rows were large, has fewer rows than were asked for.
        """
        if row_count == 0:
            return self
        fitting = int(row_count * budget_s / max(took_s, 1e-6))
        wanted = min(fitting, self.limit * _GROWTH, row_count * _GROWTH)
        return replace(self, limit=max(min(wanted, self.most_rows), min(FEWEST_ROWS, self.most_rows)))
