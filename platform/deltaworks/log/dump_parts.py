"""A dump as its tables: what to read next of each, and how that is stored.

Dump ── Part (table) ── TableDump: the cursor, stored with every group
                     └─ Pace: rows of the next chunk
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deltaworks.capture.dump import DumpState, TableDump, TextKey
from deltaworks.capture.pace import Pace
from deltaworks.log.dump_requests import DumpRequest, Ending
from deltaworks.schema import TableName

INITIAL = ""
"""The id of the dump that every captured table gets once, without being asked for."""

KEYS_AT_ONCE = 500
"""Keys of one read by key; a statement takes 65,535 parameters at most."""

STRAYS_HELD = 5_000
"""More rows than this that moved with columns not sent are not read one by one: the table is read again."""


@dataclass(slots=True, kw_only=True)
class Part:
    """One table of one dump."""

    dump_id: str
    table: TableName
    cursor: TableDump
    pace: Pace
    keys: tuple[TextKey, ...] = ()
    where: str | None = None
    is_paused: bool = False
    rests_until: float = 0.0
    """By the monotonic clock: not to be read before, because the last read could not get at the table."""

    @property
    def is_done(self) -> bool:
        """Whether every row it is to give out is in the log."""
        return self.cursor.state is DumpState.DONE

    @property
    def is_owed(self) -> bool:
        """Whether it is to be read on."""
        return not self.is_done and not self.is_paused

    @property
    def is_resting(self) -> bool:
        """Whether it waits for the table to become free."""
        return time.monotonic() < self.rests_until

    def keys_to_repair(self) -> tuple[TextKey, ...] | None:
        """The keys of rows to read again now, or `None` when the dump goes on with its range.

        While the range is read a full read's worth is taken out at once, so that few are ever held.
        """
        is_due = self.cursor.state is DumpState.REPAIRING or len(self.cursor.strays) >= KEYS_AT_ONCE
        return tuple(sorted(self.cursor.strays))[:KEYS_AT_ONCE] if is_due else None

    def next_keys(self) -> tuple[TextKey, ...]:
        """The asked keys that come next."""
        return self.keys[self.cursor.next_key : self.cursor.next_key + KEYS_AT_ONCE]

    def add_strays(self, moved: frozenset[TextKey]) -> bool:
        """Remember rows that moved; `False` when they are too many, so that the table must be read from its start."""
        strays = self.cursor.strays | moved
        if len(strays) > STRAYS_HELD:
            self.cursor = TableDump()
            return False
        self.cursor = replace(self.cursor, strays=strays)
        return True


@dataclass(slots=True, kw_only=True)
class AskedDump:
    """A dump on demand while it is under way; `ending` is set once it is over and waits to be stored so."""

    request: DumpRequest
    parts: dict[TableName, Part]
    unknown_tables: tuple[str, ...] = ()
    ending: Ending | None = None
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of its tables are read."""
        return all(part.is_done for part in self.parts.values())

    def end(self, ending: Ending, error: str | None = None) -> None:
        """Say that it is over; the first word counts."""
        if self.ending is None:
            self.ending, self.error = ending, error

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """How far it is, as it is stored in a group's progress."""
        return {
            "asked_at": self.request.asked_at.isoformat(),
            "keys": len(self.request.keys),
            "is_paused": any(part.is_paused for part in self.parts.values()),
            "ending": self.ending and self.ending.value,
            "error": self.error,
            "unknown_tables": self.unknown_tables,
            "tables": {str(table): part.cursor.to_json() for table, part in self.parts.items()},
        }


@dataclass(slots=True)
class Turns:
    """Dumps take turns, a read each; the tables of one dump come one after the other."""

    _last: str | None = field(default=None)

    def next(self, dumps: Mapping[str, Iterable[Part]]) -> Part | None:
        """The part to read now out of the ready parts of each dump, in order of the dumps' ids."""
        ready = {dump_id: first for dump_id, parts in dumps.items() if (first := next(iter(parts), None)) is not None}
        if not ready:
            return None
        order = sorted(ready)
        later = [dump_id for dump_id in order if self._last is not None and dump_id > self._last]
        self._last = (later or order)[0]
        return ready[self._last]
