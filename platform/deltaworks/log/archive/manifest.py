"""What of a log lies in its archive: a list in the log's folder, one line for each segment.

    1f0c3a77 {"name": "00000000000000000000.sealed", "first": 0, "last": 18020, "bytes": 12345678, "sha256": "…"}
    │ crc32 of the rest of the line

A line is written after the store has answered, and durable before retention may act on it. Lines are only ever
added, each in one write, so two that archive the same log at the same time do no harm. A line that a crash cut short
is passed over; its segment is then offered to the store again, which refuses it as the same.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from isal.isal_zlib import crc32

NAME = "archived"


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """A segment as it lies in the archive: groups `first` to `last`, in an object of that name and content."""

    name: str
    first: int
    last: int
    bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """What its file is called in a folder: the name in the archive may have a timeline in it."""
        return f"{self.first:020d}{Path(self.name).suffix}"

    def up_to(self, last: int) -> Self:
        """The same where another segment begins behind that group already."""
        return replace(self, last=min(self.last, last))


def read_manifest(folder: Path) -> Mapping[int, Archived]:
    """The archived segments by their first sequence, in order; empty where nothing was ever archived."""
    try:
        lines = (folder / NAME).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[int, Archived] = {}
    for line in lines:
        if (archived := _decode(line)) is not None:
            # A segment may have been archived in two forms, plain and sealed; either will do.
            found.setdefault(archived.first, archived)
    return dict(sorted(found.items()))


def add_archived(folder: Path, *segments: Archived) -> None:
    """Note segments that are safe in the archive; durable when this returns. Creates the list."""
    path = folder / NAME
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        lines = b"".join(_encode(segment) for segment in segments)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # A crash cut the last line short; ours begins on a line of its own.
            lines = b"\n" + lines
        os.write(descriptor, lines)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _encode(segment: Archived) -> bytes:
    text = json.dumps(asdict(segment)).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _decode(line: bytes) -> Archived | None:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % crc32(text):
        return None
    return Archived(**json.loads(text))
