"""How an archive is: how far behind its log, and what keeps it. Asks nobody; the archiver leaves word in a file.

The file `archive` in the log's folder holds the last fault, and is there as long as that lasts. It is not synced:
after a power cut the archiver finds the same fault again.
"""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.log.archive.manifest import read_manifest
from deltaworks.log.archive.place import ArchivePlace
from deltaworks.log.archive.upload import pending
from deltaworks.log.segment_file import segments, size_of

NAME = "archive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why nothing is archived, since when; `is_stopped` says that a person has to act."""

    error: str
    since: str
    is_stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveStatus:
    """An archive at one moment. What is `behind` is closed and not archived; retention does not remove it here."""

    address: str
    segments: int
    bytes: int
    behind_segments: int
    behind_bytes: int
    fault: Fault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlace:
    """Where a segment lies; `last` is `None` for the one that is written to."""

    first: int
    last: int | None
    bytes: int
    where: Sequence[Literal["here", "archive", "cache"]]


def archive_status(folder: Path, place: ArchivePlace) -> ArchiveStatus:
    """How an archive is, by what lies in the log's folder."""
    archived, behind = read_manifest(folder), pending(folder)
    return ArchiveStatus(
        address=place.url().rstrip("/"),
        segments=len(archived),
        bytes=sum(segment.bytes for segment in archived.values()),
        behind_segments=len(behind),
        behind_bytes=sum(size_of(folder, segment.first) for segment in behind),
        fault=read_fault(folder),
    )


def segment_places(folder: Path, cache: Path | None) -> Sequence[SegmentPlace]:
    """Every segment that is left of a log, oldest first: here, in the archive, or in both."""
    archived, here = read_manifest(folder), segments(folder)
    firsts = sorted({*archived, *here})
    found: list[SegmentPlace] = []
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        entry, size = archived.get(first), size_of(folder, first) if first in here else None
        cached = None if entry is None or cache is None else _size(cache / entry.file_name)
        where: list[Literal["here", "archive", "cache"]] = []
        where += ["here"] if size is not None else []
        where += ["archive"] if entry is not None else []
        where += ["cache"] if cached is not None else []
        last = entry.last if entry is not None else following - 1 if following is not None else None
        total = size if size is not None else entry.bytes if entry is not None else 0
        found.append(SegmentPlace(first=first, last=last, bytes=total, where=where))
    return found


def read_fault(folder: Path) -> Fault | None:
    """What keeps the archive now; `None` while all is well."""
    try:
        return Fault(**json.loads((folder / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def note_fault(folder: Path, error: DeltaworksError | OSError | None) -> Fault | None:
    """Leave word of what keeps the archive, or that nothing does; the fault that stands then."""
    if error is None:
        with suppress(FileNotFoundError):
            (folder / NAME).unlink()
        return None
    before = read_fault(folder)
    since = before.since if before is not None else datetime.now(UTC).isoformat(timespec="seconds")
    is_stopped = isinstance(error, DeltaworksError) and not isinstance(error, RetryableError)
    fault = Fault(error=str(error), since=since, is_stopped=is_stopped)
    draft = folder / f"{NAME}.{os.getpid()}.{threading.get_ident()}"
    text = json.dumps({"error": fault.error, "since": fault.since, "is_stopped": fault.is_stopped})
    draft.write_text(text, encoding="utf-8")
    draft.replace(folder / NAME)
    return fault


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
