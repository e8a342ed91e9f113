"""The segment files of a log folder: opening them, and naming what is wrong with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaworks.log.change_log import CorruptLogError, LogUsage, OffsetRetiredError
from deltaworks.log.segment import BadFrameError, Frame, read_frame, segment_name, segments


@contextmanager
def opened(folder: Path, first_sequence: int) -> Iterator[int]:
    """A segment's descriptor for reading.

    Raises:
        OffsetRetiredError: the file is not kept any more.
    """
    try:
        descriptor = os.open(folder / segment_name(first_sequence), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise retired(folder, first_sequence, oldest=min(segments(folder), default=0)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def durable_frame(descriptor: int, start: int, *, path: Path, sequence: int) -> Frame:
    """The frame of a group that was durable.

    Raises:
        CorruptLogError: it is not whole any more.
    """
    try:
        frame = read_frame(descriptor, start)
    except BadFrameError as error:
        raise corrupt(path, start, sequence, str(error)) from error
    if frame is None:
        raise corrupt(path, start, sequence, "the file ends there")
    return frame


def usage(folder: Path) -> LogUsage:
    """What the segments of a log take."""
    sizes: list[int] = []
    for first in segments(folder):
        # One that is retired meanwhile takes nothing.
        with suppress(FileNotFoundError):
            sizes.append((folder / segment_name(first)).stat().st_size)
    return LogUsage(segments=len(sizes), bytes=sum(sizes))


def corrupt(path: Path, start: int, sequence: int, what: str) -> CorruptLogError:
    """The error for a durable group that cannot be read back."""
    return CorruptLogError(
        f"cannot read group {sequence} at byte {start} of {str(path)!r}: {what}; "
        "restore the log from a copy, or remove it and dump the source again"
    )


def retired(folder: Path, sequence: int, *, oldest: int) -> OffsetRetiredError:
    """The error for a group that is older than what the log keeps."""
    return OffsetRetiredError(
        f"cannot read group {sequence} of the log {str(folder)!r}: it keeps groups from {oldest} on, and what reads "
        "it was left behind; stop its services, remove this folder and what its readers have made, then "
        f"run `deltaworks dump {folder.name}`"
    )
