"""Finds a group of a log by a place in it, whatever keeps the log: reads headers from the end, no changes."""

from datetime import datetime, timedelta
from itertools import takewhile

from deltaworks.errors import TerminalError
from deltaworks.log.change_log import GroupHeader, LogReader
from deltaworks.position import Lsn

CLOCK_MARGIN = timedelta(minutes=1)
"""How far the source's clock may be ahead of the one that stamps groups."""


class NoSuchGroupError(TerminalError):
    """The log has no group at the asked place."""


def at_sequence(reader: LogReader, sequence: int) -> GroupHeader:
    """The group of that number.

    Raises:
        NoSuchGroupError: the log does not keep it.
    """
    newer = takewhile(lambda header: header.sequence >= sequence, reader.headers_backwards())
    return _found(reader, next((header for header in newer if header.sequence == sequence), None), sequence)


def at_offset(reader: LogReader, offset: int) -> GroupHeader:
    """The group that holds the change of that offset.

    Raises:
        NoSuchGroupError: the log does not keep it.
    """
    newer = takewhile(lambda header: header.next_offset > offset, reader.headers_backwards())
    return _found(reader, next((header for header in newer if header.offset <= offset), None), offset)


def at_position(reader: LogReader, position: Lsn) -> GroupHeader:
    """The first group with which everything committed at or before `position` is in the log.

    Raises:
        NoSuchGroupError: the log has not got there, or keeps newer groups only.
    """
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
    found = None
    newer = takewhile(lambda header: header.appended_at >= moment - CLOCK_MARGIN, reader.headers_backwards())
    for header in newer:
        if header.max_committed_at is not None and header.max_committed_at >= moment:
            found = header
    return _found(reader, found, moment.isoformat())


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
