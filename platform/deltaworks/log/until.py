"""A log as it was when a group was its last, and where in it a replay begins.

log     ──group 7──group 8──group 9──group 10──►
          │ last_group_at            │ LogUntil
"""

from collections.abc import Iterator
from datetime import datetime
from itertools import dropwhile, takewhile

import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.log.change_log import EMPTY_END, GroupHeader, LogEnd, LogReader, StoredGroup
from deltaworks.log.find import Indexed, NoSuchGroupError, at_time, first_sequence
from deltaworks.log.header import end_after
from deltaworks.position import Lsn


class LogUntil:
    """A `LogReader` that ends with a group, for whoever has to see just what another has seen."""

    def __init__(self, reader: LogReader, *, sequence: int) -> None:
        self._reader = reader
        self._sequence = sequence
        self._end: LogEnd | None = None

    def move(self, sequence: int) -> None:
        """Let a later group be the last."""
        if sequence > self._sequence:
            self._sequence, self._end = sequence, None

    def end(self) -> LogEnd:
        """See `LogReader.end`."""
        if self._end is None:
            self._end = next((end_after(header) for header in self.headers_backwards()), EMPTY_END)
        return self._end

    def oldest(self) -> GroupHeader | None:
        """See `LogReader.oldest`."""
        oldest = self._reader.oldest()
        return oldest if oldest is not None and oldest.sequence <= self._sequence else None

    def read(self, *, after_sequence: int, max_changes: int | None = None) -> Iterator[StoredGroup]:
        """See `LogReader.read`."""
        last = self._sequence
        reading = self._reader.read(after_sequence=after_sequence, max_changes=max_changes)
        return takewhile(lambda group: group.header.sequence <= last, reading)

    def headers_backwards(self) -> Iterator[GroupHeader]:
        """See `LogReader.headers_backwards`."""
        last = self._sequence
        return dropwhile(lambda header: header.sequence > last, self._reader.headers_backwards())

    def wait(self, *, after_sequence: int, timeout_s: float) -> bool:
        """See `LogReader.wait`."""
        if self._sequence > after_sequence:
            return True
        return self._reader.wait(after_sequence=self._sequence, timeout_s=timeout_s)


def last_group_at(reader: LogReader, position: Lsn) -> int:
    """The last group with which nothing is in the log that was committed after a position; -1 where there is none."""
    oldest = reader.oldest()
    if isinstance(reader, Indexed) and oldest is not None:
        end = reader.end().sequence
        last = first_sequence(reader, lambda place: place.position > position, oldest=oldest.sequence, last=end) - 1
        while last >= oldest.sequence and reader.place(last).is_partial:
            last -= 1
        return last if last >= oldest.sequence else -1
    for header in reader.headers_backwards():
        # A part of a transaction stands under the position before it.
        if header.position <= position and not header.is_partial:
            return header.sequence
    return -1


def position_before(reader: LogReader, moment: datetime) -> Lsn:
    """The position just before the first change that was committed at a moment or later; the log's where none was.

    Reads dumped with it do not count. Exact as far as the source's clock never went back by more than `CLOCK_MARGIN`.

    Raises:
        OffsetRetiredError: the log no longer goes back to that moment.
    """
    try:
        found = at_time(reader, moment)
    except NoSuchGroupError:
        return reader.end().position
    oldest = reader.oldest()
    # Of a log that was shortened the first group may not be the first one from then.
    is_cut = oldest is not None and found.sequence == oldest.sequence
    for group in reader.read(after_sequence=-1 if is_cut else found.sequence - 1):
        commits = []
        for batch in group.batches:
            committed_at, txid = batch.rows.column("_committed_at"), batch.rows.column("_txid")
            is_later = pc.greater_equal(committed_at, pa.scalar(moment, committed_at.type))
            later = batch.rows.column("_commit").filter(pc.and_(is_later, pc.greater(txid, 0)))
            if (first := pc.min(later).as_py()) is not None:
                commits.append(first)
        if commits:
            return Lsn(min(commits) - 1)
    return reader.end().position
