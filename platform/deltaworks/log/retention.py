"""Removes the oldest segments of a local log: by age, by size, and never what a reader has yet to read.

    ├─ segment ─┼─ segment ─┼─ segment ─┼─ segment ─┼─ the one being written
      gone: old   gone: old   stays: a    stays        never removed
                              reader is
                              within it

Only whole segments go, the oldest first, each durably before the next, so what is left has no hole in it, whenever
the process dies. A log never loses its newest visible group: with it goes where capture has to resume.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path

import structlog

from deltaworks import faults
from deltaworks.config import LocalLogConfig
from deltaworks.log.archive.manifest import read_manifest
from deltaworks.log.local_reader import LocalLogReader
from deltaworks.log.segment_file import closed_segments as closed_files
from deltaworks.log.segment_file import maintaining, segment_files, segments, size_of, sync_folder

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A segment with a visible group behind it: nobody writes to it any more. `newest_at`: no group in it is newer."""

    first: int
    last: int
    bytes: int
    newest_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """What was removed. `left_behind` are the readers that had not read all of it, as the maximum allows.

    `unarchived` segments stay although the settings do not keep them: they are not in the archive yet.
    """

    segments: int = 0
    bytes: int = 0
    left_behind: Sequence[str] = field(default=())
    oldest_sequence: int = 0
    unarchived: int = 0


def retire(folder: Path, settings: LocalLogConfig, *, read_up_to: dict[str, int], now: datetime) -> Retired:
    """Remove what need not be kept; `read_up_to` has the last group that each reader is done with, for good.

    With an archive nothing goes that is not in there, whatever the maximum, and nobody is left behind by what is.
    Any process may do it while others read and one writes. Idempotent: after a crash the next call goes on.

    Raises:
        OSError: the disk refuses; what was not removed is as it was.
    """
    if settings.is_kept_whole:
        return Retired(oldest_sequence=min(segments(folder), default=0))
    closed = list(closed_segments(folder))
    # The segment being written counts for how much there is.
    total = sum(size_of(folder, first) for first in segments(folder))
    chosen = to_retire(closed, settings, total_bytes=total, read_up_to=min(read_up_to.values(), default=-1), now=now)
    unarchived = 0
    if settings.archive is not None:
        archived = read_manifest(folder)
        safe = list(takewhile(lambda segment: segment.first in archived, chosen))
        chosen, unarchived = safe, len(chosen) - len(safe)
        if unarchived:
            logger.warning("segments wait for the archive", log=folder.name, segments=unarchived)
    for segment in chosen:
        # The plain file of a segment that is being sealed goes first, and the sealed one comes from nowhere else.
        with maintaining(folder):
            faults.reach("log.before_remove")
            for path in segment_files(folder).get(segment.first, []):
                path.unlink(missing_ok=True)
            faults.reach("log.after_remove")
            sync_folder(folder)
    if not chosen:
        return Retired(oldest_sequence=min(segments(folder), default=0), unarchived=unarchived)
    has_all = settings.archive is not None
    behind = [] if has_all else sorted(name for name, sequence in read_up_to.items() if sequence < chosen[-1].last)
    retired = Retired(
        segments=len(chosen),
        bytes=sum(segment.bytes for segment in chosen),
        left_behind=behind,
        oldest_sequence=chosen[-1].last + 1,
        unarchived=unarchived,
    )
    logger.info("retired segments", log=folder.name, segments=retired.segments, bytes=retired.bytes)
    if behind:
        logger.error("readers are left behind", log=folder.name, readers=behind, oldest_group=retired.oldest_sequence)
    return retired


def to_retire(
    closed: Sequence[Closed], settings: LocalLogConfig, *, total_bytes: int, read_up_to: int, now: datetime
) -> list[Closed]:
    """The segments to remove, oldest first; up to the first that has to stay."""
    chosen: list[Closed] = []
    left = total_bytes
    for segment in closed:
        age = now - segment.newest_at
        is_wanted = _is_over(age, settings.keep_hours) or (
            settings.keep_bytes is not None and left - segment.bytes >= settings.keep_bytes
        )
        is_forced = _is_over(age, settings.max_hours) or (settings.max_bytes is not None and left > settings.max_bytes)
        if not (is_forced or (is_wanted and segment.last <= read_up_to)):
            break
        chosen.append(segment)
        left -= segment.bytes
    return chosen


def closed_segments(folder: Path) -> Iterator[Closed]:
    """The segments that may be removed at all, oldest first; reads one header of each."""
    reader = LocalLogReader(folder)
    for first, last in closed_files(folder):
        newest_at = reader.place(last + 1).appended_at
        yield Closed(first=first, last=last, bytes=size_of(folder, first), newest_at=newest_at)


def _is_over(age: timedelta, hours: float | None) -> bool:
    return hours is not None and age > timedelta(hours=hours)
