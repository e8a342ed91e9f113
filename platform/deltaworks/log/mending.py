"""Mends a local log whose durable groups cannot be read any more: from a copy, or by a named gap.

    salvage ─► a whole copy? ──yes──► put it in the place of the damaged file; nothing is lost
                    │no
                    ▼
    write N.mending ─► sync ─► set the damaged file aside ─► note what is lost ─► rename to N.segment ─► unlink N.sealed
    died at       1         2                            3                     4                      5
    1 2 3  the log is as it was, and the next mending begins anew
    4      as before; what is lost is noted once, and its repair may begin before the gap is there
    5      readers find the mended file first, and the next sealing replaces the other one

The last segment, which is written to, is mended once the next group has begun another one; where the log was closed, by
the next writer when it opens it. `end` says how many groups were durable, and has the header of the last of them: what
is behind that is a torn tail, and cut.

A gap is a group with its sequence, its place and no changes, so that whoever reads goes on; `GroupHeader.lost` says
what it was. Only the one that writes the log mends it: a reader that meets damage leaves word in `damaged` and stops.
"""

import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import structlog

from deltaworks import faults
from deltaworks.capture.proof import WindowSet
from deltaworks.change import MESSAGES
from deltaworks.log import damage
from deltaworks.log.change_log import ArchivedSegmentGoneError, CorruptLogError, GroupHeader, OffsetRetiredError
from deltaworks.log.damage import LostGroups
from deltaworks.log.end_file import read_end, read_last
from deltaworks.log.gap_header import Bound, gap_headers
from deltaworks.log.header import BEGIN_ANEW
from deltaworks.log.local_reader import LocalLogReader, SegmentSource
from deltaworks.log.salvage import ENDS_EARLY, Fault, Salvaged, check, salvage
from deltaworks.log.segment import encode_frame
from deltaworks.log.segment_file import (
    corrupt,
    maintaining,
    sealed_name,
    segment_files,
    segment_name,
    segments,
    sync_folder,
)
from deltaworks.position import Lsn

DRAFT = ".mending"
_NO_END = 1 << 63
"""Behind every group."""

OnSegment = Callable[[int, int], None]
"""Called with the segments that were looked through and those there are."""

logger = structlog.get_logger(__name__)


class LocalMending:
    """The damage to one local log. Anybody may look; `heed` is for the process that holds the log to write."""

    def __init__(
        self,
        folder: Path,
        *,
        archive: SegmentSource | None = None,
        end_segment: Callable[[], None] | None = None,
    ) -> None:
        """`end_segment` lets the writer's next group begin a new segment, so that the one before can be mended."""
        self.folder = folder
        self._archive = archive
        self.awaits_group = False
        """Whether what is damaged is mended after the next group, which begins a new segment."""
        self._end_segment = end_segment
        self._reader = LocalLogReader(folder, archive=archive)

    def look_through(self, on_segment: OnSegment | None = None) -> Sequence[int]:
        """Read every segment in the folder whole and ask for what is damaged to be mended; gives where that begins.

        Raises:
            CorruptLogError: there were durable groups, and no segment is left.
            LogFormatError: a newer version wrote some of it.
        """
        published, firsts, found = read_end(self.folder), self._firsts(), []
        count = 0 if published is None else published.count
        if count and not firsts:
            raise _nothing_left(self.folder, count - 1)
        for done, first in enumerate(firsts, 1):
            is_open = done == len(firsts) or firsts[done] >= count
            last = count - 1 if is_open else firsts[done] - 1
            for path in segment_files(self.folder).get(first, [])[:1]:
                # It may be sealed or removed at this moment.
                with suppress(FileNotFoundError):
                    fault = check(path, first=first, last=last)
                    if fault is not None:
                        found.append(fault.sequence)
                        damage.ask_to_mend(self.folder, fault.sequence, f"{path.name}: {fault.what}")
            if on_segment is not None:
                on_segment(done, len(firsts))
        return found

    def suspects(self) -> Sequence[int]:
        """The groups that could not be read and are not mended yet."""
        return damage.suspects(self.folder)

    def heed(self, *, is_asked_only: bool = False) -> bool:
        """Look at what readers could not read, and mend it; whether a segment was rewritten.

        With `is_asked_only` what nobody but a reader spoke of is left as it is.

        What is damaged in the segment that is written to is mended once that is closed, which this hastens.

        Raises:
            CorruptLogError: no group after the damage can be read, so where it ends is not known.
            RetryableError: the archive, which may have a whole copy, is away, or another process changes segments.
            OSError: the disk refuses; the log is as it was.
        """
        self.awaits_group = False
        rewritten = [
            sequence for sequence in damage.suspects(self.folder, is_asked_only=is_asked_only) if self._heed(sequence)
        ]
        return bool(rewritten)

    def mend_end(self, sequence: int) -> None:
        """Mend what keeps a writer from opening the log: durable groups from `sequence` on that cannot be read.

        For the one that holds the log and has none of its segments open. What was never acknowledged is cut.

        Raises:
            CorruptLogError: where the damage ends is not known.
            RetryableError: the archive, which may have a whole copy, is away, or another process changes segments.
            OSError: the disk refuses; the log is as it was.
        """
        firsts = self._firsts()
        place = bisect_right(firsts, sequence)
        if not place:
            raise _nothing_left(self.folder, sequence)
        first = firsts[place - 1]
        with maintaining(self.folder):
            if place < len(firsts):
                last = firsts[place] - 1
                self._mend(first, last)
            else:
                last = self._mend_last(first)
        self._clear(first, last)

    def owed(self) -> Sequence[LostGroups]:
        """What is lost and whose repair is not in the log's progress yet."""
        return [lost for lost in self.lost() if lost.taken_at is None]

    def lost(self) -> Sequence[LostGroups]:
        """All that was ever lost, in the order of the log."""
        return damage.lost_groups(self.folder)

    def taken(self, lost: LostGroups, *, sequence: int) -> None:
        """Note that the repair is in the log's progress from a group on; durable when this returns."""
        damage.note_taken(self.folder, lost, sequence=sequence)

    def _firsts(self) -> list[int]:
        here = segments(self.folder)
        return here if self._archive is None else sorted({*here, *self._archive.firsts()})

    def _heed(self, sequence: int) -> bool:
        firsts, published = self._firsts(), read_end(self.folder)
        place = bisect_right(firsts, sequence)
        is_here = bool(place) and firsts[place - 1] in segments(self.folder)
        if not is_here or published is None:
            # It was retired, or is in the archive alone, whose copies are compared when they are fetched.
            damage.clear_suspect(self.folder, sequence)
            return False
        if place == len(firsts) or firsts[place] >= published.count:
            if self._end_segment is not None:
                self._end_segment()
                self.awaits_group = True
            return False
        first, last = firsts[place - 1], firsts[place] - 1
        with maintaining(self.folder):
            is_rewritten = self._mend(first, last)
        self._clear(first, last)
        return is_rewritten

    def _clear(self, first: int, last: int) -> None:
        for each in self.suspects():
            if first <= each <= last:
                damage.clear_suspect(self.folder, each)

    def _mend_last(self, first: int) -> int:
        """Make what was durable of the last segment readable, without what is behind that; its last group."""
        found = Salvaged()
        for path in self._files(first):
            found.add(salvage(path, first=first, last=_NO_END))
        published = read_end(self.folder)
        count = 0 if published is None else published.count
        self._add_published(found, first, count - 1)
        last = _last_durable(found, count)
        if last >= first and not self._fill_missing(first, last):
            self._fill(first, last, found, segment_files(self.folder).get(first, []))
        return last

    def _files(self, first: int) -> Sequence[Path]:
        """The files of a segment, here or as they were archived."""
        here = segment_files(self.folder).get(first, [])
        if here or self._archive is None or first not in self._archive.firsts():
            return here
        return segment_files(self._archive.fetch(first)).get(first, [])

    def _fill_missing(self, first: int, last: int) -> bool:
        """Where a file is whole and those behind it are in none, they get one; whether it is so."""
        files = self._files(first)
        if len(files) != 1:
            return False
        begins = _missing_behind(check(files[0], first=first, last=last), first)
        if begins is not None:
            self._fill(begins, last, Salvaged(), [])
        return begins is not None

    def _add_published(self, found: Salvaged, first: int, last: int) -> None:
        """Take the header of the log's last durable group from where it is published, if it is one of these."""
        header = read_last(self.folder)
        if header is not None and first <= header.sequence <= last:
            found.headers.setdefault(header.sequence, header)

    def _mend(self, first: int, last: int) -> bool:
        """Make groups `first` to `last` readable, inside of `maintaining`; whether they were not before."""
        files = segment_files(self.folder).get(first, [])
        faults_by_file = {path: check(path, first=first, last=last) for path in files}
        if files and faults_by_file[files[0]] is None:
            return False
        if copy := next((path for path, fault in faults_by_file.items() if fault is None), None):
            logger.warning("a damaged segment gives way to its copy", log=self.folder.name, copy=copy.name)
            _remove_aside(files[0])
        elif copy := self._archived_copy(first, last):
            logger.warning("a damaged segment is restored from the archive", log=self.folder.name, copy=copy.name)
            self._restore(copy, first, last, files)
        elif not self._fill_missing(first, last):
            found = Salvaged()
            for path in files:
                found.add(salvage(path, first=first, last=last))
            self._fill(first, last, found, files)
        return True

    def _archived_copy(self, first: int, last: int) -> Path | None:
        if self._archive is None or first not in self._archive.firsts():
            return None
        try:
            folder = self._archive.fetch(first)
        except (ArchivedSegmentGoneError, CorruptLogError) as error:
            logger.error("there is no whole copy in the archive", log=self.folder.name, error=str(error))
            return None
        paths = segment_files(folder).get(first, [])
        return next((path for path in paths if check(path, first=first, last=last) is None), None)

    def _restore(self, copy: Path, first: int, last: int, files: Sequence[Path]) -> None:
        draft, place = self.folder / f"{first:020d}{DRAFT}", self.folder / copy.name
        shutil.copyfile(copy, draft)
        _sync(draft)
        if (fault := check(draft, first=first, last=last, kind=copy.suffix)) is not None:
            raise corrupt(draft, 0, fault.sequence, fault.what)
        for path in files:
            damage.set_aside(path)
        faults.reach("log.before_mend_rename")
        draft.replace(place)
        sync_folder(self.folder)
        faults.reach("log.after_mend_rename")
        for path in files:
            if path != place:
                path.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _fill(self, first: int, last: int, found: Salvaged, files: Sequence[Path]) -> None:
        """Write a segment of what is left and gaps for the rest, and put it in the place of the damaged files."""
        self._add_published(found, first, last)
        before = self._header_before(first)
        gaps = gap_headers(
            first,
            last,
            known=found.headers,
            places=found.places,
            whole=found.frames,
            before=before,
            after=_bound_behind(last, found) or self._bound_after(last),
            lost=f"damaged in {files[0].name}" if files else "their file was missing",
        )
        draft = self.folder / f"{first:020d}{DRAFT}"
        with draft.open("wb") as out:
            faults.reach("log.before_mend_write")
            for sequence in range(first, last + 1):
                parts = (found.frames[sequence],) if sequence in found.frames else encode_frame(gaps[sequence], ())
                out.writelines(parts)
            faults.reach("log.after_mend_write")
        _sync(draft)
        faults.reach("log.before_set_aside")
        asides = tuple(damage.set_aside(path) for path in files)
        faults.reach("log.after_set_aside")
        for lost in _lost(gaps, found, files=asides, follows_nothing=before is None and first > 0):
            damage.note_lost(self.folder, lost)
            logger.error("changes in the log are lost; a dump mends it", log=self.folder.name, lost=lost.summary)
        faults.reach("log.before_mend_rename")
        draft.replace(self.folder / segment_name(first))
        sync_folder(self.folder)
        faults.reach("log.after_mend_rename")
        (self.folder / sealed_name(first)).unlink(missing_ok=True)
        sync_folder(self.folder)
        faults.reach("log.after_mend_unlink")

    def _header_before(self, first: int) -> GroupHeader | None:
        """The header of the group before; what is damaged there is mended first."""
        for _ in range(2):
            try:
                return None if first == 0 else self._reader.header(first - 1)
            except OffsetRetiredError:
                return None
            except CorruptLogError:
                place = bisect_right(self._firsts(), first - 1)
                begins = self._firsts()[place - 1]
                if not place or not self._mend(begins, first - 1):
                    raise
        raise AssertionError("unreachable: what was mended can be read")

    def _bound_after(self, last: int) -> Bound:
        """Where the group after `last` begins; where that cannot be read, the next one that can."""
        firsts, published = self._firsts(), read_end(self.folder)
        count = 0 if published is None else published.count
        with suppress(CorruptLogError):
            return Bound.of(self._reader.header(last + 1))
        for place in range(bisect_right(firsts, last + 1) - 1, len(firsts)):
            ends = firsts[place + 1] - 1 if place + 1 < len(firsts) else count - 1
            found = Salvaged()
            for path in segment_files(self.folder).get(firsts[place], []):
                found.add(salvage(path, first=firsts[place], last=ends))
            later = [Bound.of(header) for sequence, header in sorted(found.headers.items()) if sequence > last]
            indexed = [row for sequence, row in sorted(found.places.items()) if sequence > last]
            if indexed:
                # An index does not say what its group follows, and nobody is told that it was less.
                return Bound(offset=indexed[0]["offset"], position=Lsn(indexed[0]["position"]))
            if later:
                return later[0]
        raise _no_bound(self.folder, last)


def _no_bound(folder: Path, last: int) -> CorruptLogError:
    return CorruptLogError(
        f"cannot mend the log {str(folder)!r}: no group after {last} can be read, nor does its file `end` say where "
        f"it ended; {BEGIN_ANEW}"
    )


def _nothing_left(folder: Path, sequence: int) -> CorruptLogError:
    return CorruptLogError(
        f"cannot mend the log {str(folder)!r}: group {sequence} was durable, and no segment up to it is left; "
        f"{BEGIN_ANEW}"
    )


def _last_durable(found: Salvaged, count: int) -> int:
    """The last group of the last segment that is kept: whole, or acknowledged once."""
    last = max(found.headers, default=-1)
    if last not in found.frames:
        # Only what is behind it says of a group that it was durable.
        last -= 1
    # The parts of a transaction that was never ended come again from the source.
    while last >= count and last in found.headers and found.headers[last].is_partial:
        last -= 1
    return max(last, count - 1)


def _bound_behind(last: int, found: Salvaged) -> Bound | None:
    """Where group `last` ends, by itself or by what is behind it in its own file."""
    if (header := found.headers.get(last)) is not None:
        return Bound(offset=header.next_offset, position=header.position)
    behind = [header for sequence, header in sorted(found.headers.items()) if sequence > last]
    return Bound.of(behind[0]) if behind else None


def _missing_behind(fault: Fault | None, first: int) -> int | None:
    """The first group that is missing behind the last one of a whole file."""
    return fault.sequence if fault is not None and fault.what == ENDS_EARLY and fault.sequence > first else None


def _remove_aside(path: Path) -> None:
    damage.set_aside(path)
    faults.reach("log.before_mend_rename")
    path.unlink()
    sync_folder(path.parent)


def _lost(
    gaps: Mapping[int, GroupHeader], found: Salvaged, *, files: Sequence[str], follows_nothing: bool
) -> Iterator[LostGroups]:
    """Each run of gaps, with what is known of its changes."""
    runs: list[list[GroupHeader]] = []
    for sequence, header in sorted(gaps.items()):
        if runs and runs[-1][-1].sequence == sequence - 1:
            runs[-1].append(header)
        else:
            runs.append([header])
    for run in runs:
        first, last = run[0], run[-1]
        proofs = [header.proof for header in run if header.proof is not None]
        windows = WindowSet()
        for proof in proofs:
            windows = windows.merge(proof.windows)
        tables = {table for header in run for table in header.tables if table != str(MESSAGES)}
        # Of the oldest group that is kept nobody else knows where it began.
        is_known = all(header.names_tables for header in run) and not (
            follows_nothing and min(gaps) == first.sequence and first.sequence not in found.headers
        )
        whys = [what for sequence, what in found.faults if sequence <= first.sequence]
        yield LostGroups(
            first=first.sequence,
            last=last.sequence,
            since=first.previous_position,
            until=last.position,
            changes=last.next_offset - first.offset,
            tables=tuple(sorted(tables)) if is_known else None,
            what=whys[-1] if whys else "there is no file with them",
            noticed_at=datetime.now(UTC),
            files=tuple(files),
            windows=windows,
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
