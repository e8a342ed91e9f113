"""What is left of a damaged segment: its whole frames, and the headers whose body is not whole any more.

    frame │ frame │ fr▓▓▓▓▓▓▓▓▓▓▓ame │ frame          where a header fails, the next whole one is looked for
      5       6       7 … 9 are lost     10           by its magic, its checksum and a place that can follow

A sealed segment is read block by block; of a damaged block whatever can be decompressed. Where its blocks cannot be
found any more they are looked for by zstd's magic. Its index says where the groups stood whose frames are lost.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltaworks.log.change_log import GroupHeader
from deltaworks.log.sealed import SealedBytes
from deltaworks.log.segment import (
    MAGIC,
    BadFrameError,
    Frame,
    FrameBytes,
    LoadedBytes,
    PlainBytes,
    frames,
    read_body,
    read_head,
)

ENDS_EARLY = "its file is missing, or ends before it"
"""What is wrong with a file of whole frames that are not all."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SEARCHED_BYTES = 1 << 20
_DECOMPRESSED_BYTES = 1 << 16


@dataclass(slots=True)
class Salvaged:
    """Groups by sequence: whole `frames` as they were appended, all `headers`, and `places` by a sealed file's index.

    `faults` say what is wrong, each with the group from which on it is.
    """

    frames: dict[int, bytes] = field(default_factory=dict)
    headers: dict[int, GroupHeader] = field(default_factory=dict)
    places: dict[int, dict[str, Any]] = field(default_factory=dict)  # Any: a row of `sealed.GROUPS`
    faults: list[tuple[int, str]] = field(default_factory=list)

    def has_all(self, first: int, last: int) -> bool:
        """Whether every group is whole."""
        return all(sequence in self.frames for sequence in range(first, last + 1))

    def add(self, other: "Salvaged") -> None:
        """Take from another file what is not here."""
        self.frames = other.frames | self.frames
        self.headers = other.headers | self.headers
        self.places = other.places | self.places
        self.faults += other.faults


@dataclass(frozen=True, slots=True)
class Fault:
    """The first group of a segment's file that cannot be read, and why."""

    sequence: int
    what: str


def check(path: Path, *, first: int, last: int, kind: str | None = None) -> Fault | None:
    """Read a segment's file of groups `first` to `last` as a reader would; what is wrong with it, `None` if nothing is.

    What is behind `last` is nobody's to read. `kind` is the suffix it stands for, where it has another name.

    Raises:
        FileNotFoundError: it is not there.
        LogFormatError: a newer version wrote it.
    """
    sequence = first
    try:
        with path.open("rb") as file:
            source = _opened(file.fileno(), kind or path.suffix)
            for frame in frames(source):
                if sequence > last:
                    return None
                header = frame.header()
                if header.sequence != sequence:
                    raise BadFrameError(f"group {header.sequence} does not belong there")
                # A block was compared when the frame's head was read.
                if not source.checks_itself:
                    read_body(source, frame)
                sequence += 1
    except BadFrameError as error:
        return None if sequence > last else Fault(sequence, str(error))
    return None if sequence > last else Fault(sequence, ENDS_EARLY)


def _opened(descriptor: int, suffix: str) -> FrameBytes:
    if suffix != ".sealed":
        return PlainBytes(descriptor)
    sealed = SealedBytes(descriptor)
    # Readers find groups by it.
    sealed.groups()
    return sealed


def salvage(path: Path, *, first: int, last: int) -> Salvaged:
    """All that can be read in a segment's file of groups `first` to `last`; holds its whole frames in memory.

    Raises:
        FileNotFoundError: it is not there.
        LogFormatError: a newer version wrote it.
    """
    found = Salvaged()
    with path.open("rb") as file:
        for what, source in _sources(path, file.fileno(), found, first):
            _take(source, found, what, first=first, last=last)
    return found


def _sources(path: Path, descriptor: int, found: Salvaged, first: int) -> Iterator[tuple[str, FrameBytes]]:
    """The pieces of a file that hold frames, each with what it is called."""
    if path.suffix != ".sealed":
        yield path.name, PlainBytes(descriptor)
        return
    try:
        sealed = SealedBytes(descriptor, is_salvage=True)
    except BadFrameError as error:
        found.faults.append((first, f"{path.name}: {error}"))
        stored = _searched_blocks(path.read_bytes())
    else:
        try:
            found.places |= {row["sequence"]: row for row in sealed.groups().to_pylist()}
        except BadFrameError as error:
            found.faults.append((first, f"{path.name}: {error}"))
        stored = map(decompressed, sealed.stored_blocks())
    for number, plain in enumerate(stored):
        yield f"{path.name}, block {number}", LoadedBytes(pa.py_buffer(plain), start=0)


def _take(source: FrameBytes, found: Salvaged, what: str, *, first: int, last: int) -> None:
    before = found.headers[max(found.headers)] if found.headers else None
    at = 0
    while at < source.size:
        following = first if before is None else before.sequence + 1
        try:
            frame = _frame_at(source, at, before, first=following, last=last)
        except BadFrameError as error:
            found.faults.append((following, f"{what} at byte {at}: {error}"))
            at = _next_frame(source, at + 1, before, first=following, last=last)
            continue
        before = frame.header()
        found.headers[before.sequence] = before
        at = frame.end
        try:
            read_body(source, frame)
        except BadFrameError as error:
            found.faults.append((before.sequence, f"{what} at byte {frame.start}: {error}"))
            if not _is_frame(source, at, before, first=before.sequence + 1, last=last):
                # Bytes of it may be gone, then what follows has moved.
                at = _next_frame(source, frame.body_start, before, first=before.sequence + 1, last=last)
        else:
            found.frames[before.sequence] = bytes(source.read(frame.start, frame.end - frame.start))


def _frame_at(source: FrameBytes, at: int, before: GroupHeader | None, *, first: int, last: int) -> Frame:
    frame = read_head(source, at)
    if frame is None:
        raise BadFrameError("the file ends there")
    header = frame.header()
    # A row may hold a piece of some log; what does not go on from here is none of ours.
    goes_on = before is None or (header.offset >= before.next_offset and header.previous_position >= before.position)
    if not (first <= header.sequence <= last and goes_on):
        raise BadFrameError(f"group {header.sequence} does not belong there")
    return frame


def _is_frame(source: FrameBytes, at: int, before: GroupHeader | None, *, first: int, last: int) -> bool:
    try:
        _frame_at(source, at, before, first=first, last=last)
    except BadFrameError:
        return False
    return True


def _next_frame(source: FrameBytes, start: int, before: GroupHeader | None, *, first: int, last: int) -> int:
    """Where the next frame begins that can follow; the source's end where there is none."""
    while start < source.size:
        piece = bytes(source.read(start, _SEARCHED_BYTES))
        at = piece.find(MAGIC)
        while at >= 0:
            if _is_frame(source, start + at, before, first=first, last=last):
                return start + at
            at = piece.find(MAGIC, at + 1)
        # The magic may lie across the end of the piece.
        start += max(1, len(piece) - len(MAGIC) + 1)
    return source.size


def decompressed(stored: bytes) -> bytes:
    """A zstd frame's content, as far as it can be had."""
    pieces: list[bytes] = []
    with suppress(OSError, pa.ArrowException), pa.CompressedInputStream(pa.BufferReader(stored), "zstd") as stream:
        while piece := stream.read(_DECOMPRESSED_BYTES):
            pieces.append(piece)
    return b"".join(pieces)


def _searched_blocks(content: bytes) -> Iterator[bytes]:
    places = []
    at = content.find(_ZSTD_MAGIC)
    while at >= 0:
        places.append(at)
        at = content.find(_ZSTD_MAGIC, at + 1)
    for start, end in pairwise([*places, len(content)]):
        yield decompressed(content[start:end])
