"""Watches what the stream does not show: the source's catalog, its history, and how its slot is.

    look: survey the catalog at P ──► the stream passes P ──► settle: what changed, which tables to dump again
          ask how the slot is     ──► alarm, heartbeat

A survey counts once the stream has passed its position, so everything from before a change of a table is in
the log when its dump begins. The last survey that counted is stored in the group where it did; later groups
name that group, because a catalog is large and seldom changes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import structlog

from deltaworks.capture.continuity import Gap, SlotHealth
from deltaworks.capture.schema_change import SchemaChange, Survey, carry_over, compare, streamed_change
from deltaworks.capture.source import Source
from deltaworks.change import ChangeBatch
from deltaworks.errors import RetryableError
from deltaworks.log.change_log import LogReader, OffsetRetiredError
from deltaworks.position import Lsn
from deltaworks.schema import TableName

LOOK_EVERY_S = 10.0
"""How often the catalog and the slot are looked at; a few milliseconds each time."""

STORED_ANEW_EVERY = 10_000
"""Groups after which the survey is stored again, so that retention of old groups does not take it away."""

HEARTBEAT_BYTES = 16 << 20
"""Log of other tables and databases that may pass without a sign of ours before we write one."""

logger = structlog.get_logger()


class UnpublishedError(RetryableError):
    """A captured table is not in the publication any more; preparing the source puts it back."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """What a source is known to be, during one connection's life. Not thread-safe.

    `write_mark` commits a mark into the source's log.
    """

    source: Source
    reader: LogReader
    write_mark: Callable[[], object]
    clock: Callable[[], float] = time.monotonic
    is_unsaved: bool = False
    """Whether anything here differs from what is stored."""
    known: Survey | None = None
    """The last survey that counts."""
    gaps: tuple[Gap, ...] = ()
    """Gaps whose tables are not all dumped yet."""
    _changes: list[SchemaChange] = field(default_factory=list)
    _pending: Survey | None = None
    _stored_at: int | None = None
    _streamed: dict[TableName, Mapping[str, str]] = field(default_factory=dict)
    _told: dict[TableName, Mapping[str, str]] = field(default_factory=dict)
    _looked_at: float = float("-inf")
    _confirmed: Lsn | None = None

    @property
    def is_settled(self) -> bool:
        """Whether every survey that was taken counts by now."""
        return self._pending is None

    def load(self, progress: Mapping[str, Any]) -> None:  # Any: JSON values
        """Take up what is stored."""
        self.gaps = tuple(Gap.from_json(gap) for gap in progress.get("gaps", ()))
        self._stored_at = progress.get("survey_at")
        self.known = read_survey(self.reader, progress)

    def to_json(self, *, sequence: int) -> dict[str, Any]:  # Any: JSON values
        """What is stored with the group of that sequence."""
        stored: dict[str, Any] = {"gaps": [gap.to_json() for gap in self.gaps]}
        if self._changes:
            stored["schema_changes"] = [change.to_json() for change in self._changes]
        if self.known is None:
            return stored
        if self._stored_at is None or sequence - self._stored_at >= STORED_ANEW_EVERY:
            stored["survey"] = self.known.to_json()
            return stored | {"survey_at": sequence}
        return stored | {"survey_at": self._stored_at}

    def saved(self, *, sequence: int) -> None:
        """Note that `to_json` of that sequence is durable."""
        self._changes.clear()
        self.is_unsaved = False
        if self.known is not None and (self._stored_at is None or sequence - self._stored_at >= STORED_ANEW_EVERY):
            self._stored_at = sequence

    def begin_anew(self, gap: Gap | None) -> Sequence[SchemaChange]:
        """Take a survey that counts at once, because all tables are dumped again; note the gap.

        Gives what changed while nobody looked.
        """
        survey = self.source.survey()
        changes = [] if self.known is None else list(compare(self.known, survey))
        for change in changes:
            self._record(change)
        self._settle(survey)
        if gap is not None:
            self.gaps = (*self.gaps, gap)
        self.is_unsaved = True
        return changes

    def note_gap(self, gap: Gap) -> bool:
        """Note a gap that was found in the log itself; `False` where it is noted already."""
        if gap in self.gaps:
            return False
        self.gaps = (*self.gaps, gap)
        self.is_unsaved = True
        return True

    def close_gaps(self) -> None:
        """Note that everything that was missed is in the log."""
        for gap in self.gaps:
            logger.warning("a gap is repaired", source=self.source.name, gap=gap.summary)
        self.is_unsaved = self.is_unsaved or bool(self.gaps)
        self.gaps = ()

    def look(self, *, at_once: bool = False) -> None:
        """Look at catalog and slot, unless that was done a short while ago.

        Raises:
            UnpublishedError: the publication lacks a table.
        """
        if not at_once and self.clock() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = self.clock()
        survey = self.source.survey()
        lacking = [str(name) for name, table in survey.tables.items() if table.published is None]
        if lacking:
            raise UnpublishedError(
                f"cannot see all changes of source {self.source.name!r}: its publication lacks {', '.join(lacking)}"
            )
        if self.known is None:
            self._settle(survey)
            self.is_unsaved = True
        elif list(compare(self.known, survey)) or _place(self.known) != _place(survey):
            self._pending = survey
            # On an idle source nothing else would bring the stream past the survey.
            self.write_mark()
        health = self.source.health()
        if health is not None:
            self._look_at_slot(health)

    def note(self, batch: ChangeBatch, *, position: Lsn) -> None:
        """Take note of a batch of the stream: where its columns are others, the catalog has more to say."""
        types = {column.name: column.source_type for column in batch.schema.columns}
        name = batch.schema.name
        before, listed = self._streamed.get(name), self._listed(name)
        if before is None:
            # A column that is not published is in the catalog and never in the stream.
            before = {column: kind for column, kind in listed.items() if column in types} or types
        self._streamed[name] = types
        if types not in (before, listed):
            self._record(streamed_change(name, before, types, position=position))
            self._told[name] = types
            self._looked_at = float("-inf")

    def settle(self, position: Lsn) -> Sequence[SchemaChange]:
        """What happened to the tables, once the stream has passed the position of a survey."""
        survey = self._pending
        if survey is None or self.known is None or position < survey.position:
            return ()
        changes = list(compare(self.known, survey))
        for change in changes:
            # The stream may have said all of it before.
            if change.needs_dump or change.new is None or self._told.get(change.table) != change.new:
                self._record(change)
        self._settle(survey)
        self.is_unsaved = True
        return changes

    def _settle(self, survey: Survey) -> None:
        self._pending = None
        self.known = carry_over(self.known, survey)
        self._stored_at = None
        self._told.clear()

    def _listed(self, name: TableName) -> Mapping[str, str]:
        table = None if self.known is None else self.known.tables.get(name)
        return {} if table is None else table.types

    def _record(self, change: SchemaChange) -> None:
        level = logger.warning if change.needs_dump or change.new is None else logger.info
        level("a table changed its schema", source=self.source.name, change=change.summary)
        self._changes.append(change)
        self.is_unsaved = True

    def _look_at_slot(self, health: SlotHealth) -> None:
        ours = {"source": self.source.name, "state": health.state, "kept_bytes": health.kept_bytes}
        if health.kept_bytes > self.source.slot_alarm_bytes or health.state == "unreserved":
            logger.error("the source keeps much log for the slot", safe_bytes=health.safe_bytes, **ours)
        stands = health.confirmed is not None and health.confirmed == self._confirmed
        if stands and health.current.value - (health.confirmed or health.current).value > HEARTBEAT_BYTES:
            logger.info("a heartbeat moves the slot on", **ours)
            self.write_mark()
        self._confirmed = health.confirmed


def read_survey(reader: LogReader, progress: Mapping[str, Any]) -> Survey | None:  # Any: JSON values
    """The newest survey as of a group with this progress; `None` where there was none, or it is no longer kept."""
    stored, sequence = progress.get("survey"), progress.get("survey_at")
    if stored is None and sequence is not None:
        try:
            for group in islice(reader.read(after_sequence=sequence - 1, max_changes=1), 1):
                stored = group.header.progress.get("survey")
        except OffsetRetiredError:
            logger.warning("the last survey is no longer kept: changes of schema since then go unseen", group=sequence)
    return None if stored is None else Survey.from_json(stored)


def _place(survey: Survey) -> tuple[str, int, str | None]:
    return survey.system, survey.timeline, survey.publication
