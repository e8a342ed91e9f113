"""Finds a group of a log by a place in it, whatever keeps the log: reads no changes.

A reader that knows where any group stands is searched by halves, over the index of sealed segments; of any other the
headers are read from the end.
"""

from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import chain, takewhile
from typing import Protocol, runtime_checkable

from deltaworks.errors import TerminalError
from deltaworks.log.change_log import GroupHeader, GroupPlace, LogEnd, LogReader
from deltaworks.position import Lsn

CLOCK_MARGIN = timedelta(minutes=1)
"""How far the source's clock may be ahead of the one that stamps groups, and how far it may go back."""


@runtime_checkable
class Indexed(Protocol):
    """A reader that knows where any group stands without reading those around it."""

    def oldest(self) -> GroupHeader | None:
        """See `LogReader.oldest`."""

    def end(self) -> LogEnd:
        """See `LogReader.end`."""

    def place(self, sequence: int) -> GroupPlace:
        """Where a durable group stands."""

    def header(self, sequence: int) -> GroupHeader:
        """The header of a durable group."""


class NoSuchGroupError(TerminalError):
    """The log has no group at the asked place."""


def at_sequence(reader: LogReader, sequence: int) -> GroupHeader:
    """The group of that number.

    Raises:
        NoSuchGroupError: the log does not keep it.
    """
    if isinstance(reader, Indexed):
        oldest = reader.oldest()
        is_kept = oldest is not None and oldest.sequence <= sequence <= reader.end().sequence
        return _found(reader, reader.header(sequence) if is_kept else None, sequence)
    newer = takewhile(lambda header: header.sequence >= sequence, reader.headers_backwards())
    return _found(reader, next((header for header in newer if header.sequence == sequence), None), sequence)


def at_offset(reader: LogReader, offset: int) -> GroupHeader:
    """The group that holds the change of that offset.

    Raises:
        NoSuchGroupError: the log does not keep it.
    """
    if isinstance(reader, Indexed):
        found = _first(reader, lambda place: place.next_offset > offset)
        return _found(reader, found if found is not None and found.offset <= offset else None, offset)
    newer = takewhile(lambda header: header.next_offset > offset, reader.headers_backwards())
    return _found(reader, next((header for header in newer if header.offset <= offset), None), offset)


def at_position(reader: LogReader, position: Lsn) -> GroupHeader:
    """The first group with which everything committed at or before `position` is in the log.

    Raises:
        NoSuchGroupError: the log has not got there, or keeps newer groups only.
    """
    if isinstance(reader, Indexed):
        found, oldest = _first(reader, lambda place: place.position >= position), reader.oldest()
        # Of a log that was shortened the first group may not be the first one that got there.
        is_first = found is not None and (found.sequence == 0 or found != oldest)
        return _found(reader, found if is_first else None, str(position))
    found = None
    for header in reader.headers_backwards():
        if header.position < position:
            return _found(reader, found, str(position))
        found = header
    return _found(reader, found if found is not None and found.sequence == 0 else None, str(position))


def at_time(reader: LogReader, moment: datetime) -> GroupHeader:
    """The first group that is kept with a change committed at or after an aware `moment`; dumped rows do not count.

    Raises:
        NoSuchGroupError: nothing was committed since then.
    """
    if isinstance(reader, Indexed):
        places = map(reader.place, range(_not_before(reader, moment), reader.end().sequence + 1))
        later = (place for place in places if place.max_committed_at is not None and place.max_committed_at >= moment)
        place = next(later, None)
        return _found(reader, None if place is None else reader.header(place.sequence), moment.isoformat())
    found = None
    newer = takewhile(lambda header: header.appended_at >= moment - CLOCK_MARGIN, reader.headers_backwards())
    for header in newer:
        if header.max_committed_at is not None and header.max_committed_at >= moment:
            found = header
    return _found(reader, found, moment.isoformat())


def first_sequence(reader: Indexed, is_there: Callable[[GroupPlace], bool], *, oldest: int, last: int) -> int:
    """The first group from `oldest` to `last` for which something holds, which then does for all behind it.

    One past `last` where it holds for none.
    """
    known = range(oldest, last + 1)
    return oldest + bisect_left(known, True, key=lambda sequence: is_there(reader.place(sequence)))


def _not_before(reader: Indexed, moment: datetime) -> int:
    """A group before which nothing was committed at or after a moment, and not long before the first that was."""
    oldest, last = reader.oldest(), reader.end().sequence
    if oldest is None:
        return last + 1
    since = moment - CLOCK_MARGIN
    first = first_sequence(reader, lambda place: place.appended_at >= since, oldest=oldest.sequence, last=last)

    def is_committed_since(place: GroupPlace) -> bool:
        # A group without changes of transactions, of a dump or an idle hour, stands where the one before it does.
        before = (reader.place(sequence) for sequence in range(place.sequence - 1, first - 1, -1))
        times = (each.max_committed_at for each in chain([place], before))
        return next((time for time in times if time is not None), since - CLOCK_MARGIN) >= since

    # What was appended long after it was committed: capture had fallen behind.
    return first_sequence(reader, is_committed_since, oldest=first, last=last)


def _first(reader: LogReader, is_there: Callable[[GroupPlace], bool]) -> GroupHeader | None:
    oldest, last = reader.oldest(), reader.end().sequence
    if oldest is None or not isinstance(reader, Indexed):
        return None
    sequence = first_sequence(reader, is_there, oldest=oldest.sequence, last=last)
    return reader.header(sequence) if sequence <= last else None


def _found(reader: LogReader, header: GroupHeader | None, place: object) -> GroupHeader:
    if header is not None:
        return header
    oldest, end = reader.oldest(), reader.end()
    if oldest is None:
        raise NoSuchGroupError(f"no group at {place!r}: the log is empty; run `deltaworks capture`")
    raise NoSuchGroupError(
        f"no group at {place!r}: the log keeps groups {oldest.sequence} to {end.sequence}, offsets {oldest.offset} to "
        f"{end.offset - 1}, positions after {str(oldest.previous_position)!r} up to {str(end.position)!r}"
    )
