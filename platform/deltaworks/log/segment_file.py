"""The segment files of a log folder: which there are, opening them, and naming what is wrong with them.

    00000000000000018021.segment   plain: frames as they are appended   (see `segment`)
    00000000000000000000.sealed    a closed one, compressed             (see `sealed`)

A segment's name is the sequence of its first group. While one is being sealed both files are there for a moment, and
hold the same; the plain one goes last. So whoever looks for the plain file first and then for the sealed one finds it.
"""

import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deltaworks.log.change_log import CorruptLogError, LogBusyError, LogUsage, OffsetRetiredError
from deltaworks.log.end_file import read_end
from deltaworks.log.sealed import SealedBytes, plain_size
from deltaworks.log.segment import BadFrameError, Frame, FrameBytes, PlainBytes, read_frame

MAINTENANCE_FILE = "maintenance"
MAINTENANCE_PATIENCE_S = 30.0
"""How long one change of closed segments waits for another; sealing one takes about a second."""

_PLAIN, _SEALED = ".segment", ".sealed"


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment that is open for reading, until whoever opened it is done."""

    first: int
    path: Path
    bytes: FrameBytes
    inode: int

    def frame(self, start: int, *, sequence: int) -> Frame:
        """The frame of a group that was durable.

        Raises:
            CorruptLogError: it is not whole any more.
        """
        try:
            frame = read_frame(self.bytes, start)
        except BadFrameError as error:
            raise corrupt(self.path, start, sequence, str(error)) from error
        if frame is None:
            raise corrupt(self.path, start, sequence, "the file ends there")
        return frame


def segment_name(first_sequence: int) -> str:
    """The file name of the plain segment that starts with this group."""
    return f"{first_sequence:020d}{_PLAIN}"


def sealed_name(first_sequence: int) -> str:
    """The file name of the sealed segment that starts with this group."""
    return f"{first_sequence:020d}{_SEALED}"


def segment_files(folder: Path) -> dict[int, list[Path]]:
    """The files of each segment by its first sequence, in order; the plain one first where there are two.

    Empty for a folder that is not there. A segment that is not the last one is never written to again.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    found: dict[int, list[Path]] = {}
    for suffix in (_PLAIN, _SEALED):
        for name in names:
            if name.endswith(suffix):
                found.setdefault(int(name.removesuffix(suffix)), []).append(folder / name)
    return dict(sorted(found.items()))


def segments(folder: Path) -> list[int]:
    """The first sequence of each segment in the folder, in order; empty for a folder that is not there."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted({int(name.partition(".")[0]) for name in names if name.endswith((_PLAIN, _SEALED))})


def closed_segments(folder: Path) -> Iterator[tuple[int, int]]:
    """The first and last sequence of each segment that nobody writes to any more, oldest first.

    Behind it is a group that every reader sees, not just the parts of an unfinished transaction.
    """
    published = read_end(folder)
    for first, following in itertools.pairwise(segments(folder)):
        if published is None or following >= published.count:
            return
        yield first, following - 1


@contextmanager
def opened(folder: Path, first_sequence: int) -> Iterator[OpenSegment]:
    """A segment for reading; it stays readable while it is sealed or removed.

    Raises:
        OffsetRetiredError: the file is not kept any more.
        CorruptLogError: what says where everything is in a sealed one is damaged.
    """
    descriptor, path = _open(folder, first_sequence)
    try:
        try:
            content = SealedBytes(descriptor) if path.suffix == _SEALED else PlainBytes(descriptor)
        except BadFrameError as error:
            raise corrupt(path, 0, first_sequence, str(error)) from error
        yield OpenSegment(first_sequence, path, content, os.fstat(descriptor).st_ino)
    finally:
        os.close(descriptor)


def closed_file(folder: Path, first_sequence: int) -> BinaryIO:
    """The file of a closed segment, sealed where it is; its bytes are never written to again.

    Raises:
        OffsetRetiredError: it is not kept any more.
    """
    # Last again: it may be sealed between the first look and the second.
    for name in (sealed_name(first_sequence), segment_name(first_sequence), sealed_name(first_sequence)):
        with suppress(FileNotFoundError):
            return (folder / name).open("rb")
    raise retired(folder, first_sequence, oldest=min(segments(folder), default=0))


def size_of(folder: Path, first_sequence: int) -> int:
    """The bytes of a segment on disk; none for one that is not there."""
    total = 0
    for name in (segment_name(first_sequence), sealed_name(first_sequence)):
        with suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total


def usage(folder: Path) -> LogUsage:
    """What the segments of a log take."""
    count = taken = sealed = plain = 0
    for first, paths in segment_files(folder).items():
        # One that is retired meanwhile takes nothing.
        with suppress(FileNotFoundError):
            size = size_of(folder, first)
            is_sealed = paths[0].suffix == _SEALED
            with suppress(BadFrameError):
                plain += plain_size(paths[0]) if is_sealed else size
            count, taken, sealed = count + 1, taken + size, sealed + is_sealed
    return LogUsage(segments=count, bytes=taken, sealed=sealed, plain_bytes=plain)


def corrupt(path: Path, start: int, sequence: int, what: str) -> CorruptLogError:
    """The error for a durable group that cannot be read back."""
    return CorruptLogError(
        f"cannot read group {sequence} at byte {start} of {str(path)!r}: {what}; {next_step(path.parent)}",
        sequence=sequence,
    )


def next_step(folder: Path) -> str:
    """What mends a log in which a durable group cannot be read."""
    return (
        f"`deltaworks log mend {folder.name}`, or a capture service by itself, makes a named gap of what is lost and "
        "brings its rows back"
    )


def retired(folder: Path, sequence: int, *, oldest: int) -> OffsetRetiredError:
    """The error for a group that is older than what the log keeps."""
    return OffsetRetiredError(
        f"cannot read group {sequence} of the log {str(folder)!r}: it keeps groups from {oldest} on, and what reads "
        f"it was left behind; stop that reader, remove what it has made, and run `deltaworks log begin {folder.name}` "
        "for the lake, or with `--app APP` for an app"
    )


@contextmanager
def maintaining(folder: Path, *, patience_s: float = MAINTENANCE_PATIENCE_S) -> Iterator[None]:
    """Be the one that seals, removes or mends segments of this log; the kernel lets go when the process dies.

    Raises:
        LogBusyError: another process is at it for longer than `patience_s`.
    """
    lock = os.open(folder / MAINTENANCE_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise LogBusyError(
                        f"cannot change closed segments of the log {str(folder)!r}: another process is at it; try again"
                    ) from error
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def sync_folder(folder: Path) -> None:
    """Make what was named, renamed or removed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(folder: Path, first_sequence: int) -> tuple[int, Path]:
    for name in (segment_name(first_sequence), sealed_name(first_sequence)):
        with suppress(FileNotFoundError):
            return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC), folder / name
    raise retired(folder, first_sequence, oldest=min(segments(folder), default=0))
