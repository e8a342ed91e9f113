"""What is lost of a log itself, on its way to being dumped again: from the mending to the log's progress.

a reader leaves word ─► mend ─► lost, owed ─► gap, dumps, sweeps ─► stored with a group ─► taken
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from deltaworks.capture.source import Source
from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.log.change_log import CorruptLogError
from deltaworks.log.damage import LostGroups
from deltaworks.log.watch import Watch
from deltaworks.position import Lsn
from deltaworks.schema import TableName

LOOK_EVERY_S = 1.0
"""How often capture looks whether a reader met damage; nothing is read where none did."""

logger = structlog.get_logger(__name__)


class LogMendedError(RetryableError):
    """Groups of the log could not be read and are mended now."""


class Mending(Protocol):
    """Mends the log that is written to; see `mending.LocalMending`."""

    def heed(self, *, is_asked_only: bool = False) -> bool:
        """Mend what readers could not read; whether there was anything. What is lost is `owed` from then on.

        With `is_asked_only` only what a person asked for.
        """

    @property
    def awaits_group(self) -> bool:
        """Whether what `heed` could not mend yet can be mended after the next group."""

    def owed(self) -> Sequence[LostGroups]:
        """What is lost and whose repair is not in the log's progress yet."""

    def taken(self, lost: LostGroups, *, sequence: int) -> None:
        """Note that it is, from that group on; durable when this returns."""


@dataclass(slots=True, kw_only=True)
class Losses:
    """The losses of a source's log during one connection's life. Not thread-safe.

    `redump` dumps a table again, and deletes its rows that are gone since a position.
    """

    mending: Mending | None
    source: Source
    watch: Watch
    redump: Callable[[TableName, Lsn], None]
    clock: Callable[[], float] = time.monotonic
    _owed: list[LostGroups] = field(default_factory=list)
    _looked_at: float = float("-inf")

    def look(self, position: Lsn) -> None:
        """Mend what cannot be read, and have dumped again what is lost, unless that was done a short while ago.

        `position` is that of the log's end: whatever made rows go in a lost group was before it.
        """
        if self.mending is None or self.clock() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = self.clock()
        try:
            self.mending.heed(is_asked_only=not self.source.repairs_gaps)
        except (DeltaworksError, OSError) as error:
            logger.error("a damaged log is not mended yet", source=self.source.name, error=str(error))
        if self.mending.awaits_group:
            # On an idle source there would be none.
            self.watch.is_unsaved = True
        for lost in self.mending.owed():
            if lost not in self._owed:
                self._owe(lost, position)

    @property
    def is_waiting(self) -> bool:
        """Whether something is mended at a next look."""
        return self.mending is not None and self.mending.awaits_group

    def after(self, error: CorruptLogError) -> LogMendedError:
        """What to go on with after an error of capture's own reading: surveys, and the keys that a sweep looks for.

        Raises:
            CorruptLogError: the same one, where nothing could be mended.
        """
        if self.mending is None or not self.mending.heed(is_asked_only=not self.source.repairs_gaps):
            raise error
        return LogMendedError(f"groups of the log were mended: {error}")

    def saved(self, *, sequence: int) -> None:
        """Note that what was owed is in the progress of that group, which is durable."""
        while self.mending is not None and self._owed:
            self.mending.taken(self._owed[0], sequence=sequence)
            self._owed.pop(0)

    def _owe(self, lost: LostGroups, position: Lsn) -> None:
        self._owed.append(lost)
        captured = {str(schema.name): schema.name for schema in self.source.tables()}
        tables = captured if lost.tables is None else lost.tables
        affected = [captured[table] for table in tables if table in captured] if lost.may_have_changes else []
        # A life that died before the repair was noted as taken has it in the log's progress.
        if affected and self.watch.note_gap(lost.gap):
            for table in affected:
                self.redump(table, position)
        self.watch.is_unsaved = True
