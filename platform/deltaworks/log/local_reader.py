"""Reads a change log on a local disk, while another process may write to it. Layout in `local`."""

import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from deltaworks.log.ahead import FIRST_BYTES, HEAD_BYTES, RUN_BYTES, Run, checked
from deltaworks.log.change_log import (
    EMPTY_END,
    ArchivedSegmentGoneError,
    CorruptLogError,
    GroupHeader,
    GroupPlace,
    LogEnd,
    OffsetRetiredError,
    StoredGroup,
)
from deltaworks.log.damage import note_suspect
from deltaworks.log.end_file import NAME as END_FILE
from deltaworks.log.end_file import read_end
from deltaworks.log.header import check_follows, check_not_ahead, end_after
from deltaworks.log.sealed import SealedBytes
from deltaworks.log.segment import BadFrameError, Schemas, decode_frame, read_frame
from deltaworks.log.segment_file import OpenSegment, corrupt, next_step, opened, retired, segments, size_of
from deltaworks.log.wake import wait_until
from deltaworks.position import Lsn

_PLACE = tuple(field.name for field in fields(GroupPlace))


_FETCH_TRIES = 5


class SegmentSource(Protocol):
    """Where segments are that a log's folder has no more; see `archive.cache`."""

    def firsts(self) -> Collection[int]:
        """The first sequence of each."""

    def fetch(self, first: int) -> Path:
        """A folder on this machine that has the segment now; it may be gone from there a moment later.

        Raises:
            ArchivedSegmentGoneError: it is nowhere any more.
        """

    def expect(self, first: int, *, beside: int) -> None:
        """That segment will be asked for while `beside` is read: bring it here meanwhile, where there is room for both.

        Returns at once. What goes wrong is raised by the `fetch` that comes after it.
        """


class LocalLogReader:
    """Reads a log folder, also while another process writes to it; sees durable groups only.

    Groups that are not in the folder any more are read from `archive`. Thread-safe. Holds no file open between calls.
    Every byte is compared with a checksum before it is given. While the groups of one call are taken, at most
    `ahead.AHEAD_BYTES` and one group more are in memory ahead of them, and one segment is fetched ahead of the one that
    they are in.
    """

    def __init__(self, folder: Path, *, archive: SegmentSource | None = None) -> None:
        self.folder = folder
        self._archive = archive
        self._lock = threading.Lock()
        self._identity = (0, 0)
        self._end = EMPTY_END
        self._firsts: list[int] = []
        self._bounds: dict[int, array[int]] = {}
        # The file that the bounds are of: sealing keeps them, mending may not.
        self._inodes: dict[int, int] = {}
        self._index: tuple[int, pa.Table] | None = None
        self._schemas = Schemas()

    def end(self) -> LogEnd:
        """The end as of now; some microseconds when nothing was appended since the last call."""
        published = read_end(self.folder)
        if published is None:
            _check_has_no_groups(self.folder)
            return EMPTY_END
        with self._lock, self._telling():
            if published.identity != self._identity:
                # The folder was removed and made anew: what is known here is of another log.
                self._forget(published.identity)
            if published.count - 1 > self._end.sequence:
                self._end = end_after(self._header(published.count - 1))
            return self._end

    def oldest(self) -> GroupHeader | None:
        """See `LogReader.oldest`."""
        end = self.end().sequence
        while (first := min(self._segments(), default=0)) <= end:
            try:
                return self.header(first)
            except ArchivedSegmentGoneError:
                raise
            except OffsetRetiredError:
                # It was retired between the two looks; the one after it is the oldest now.
                continue
        return None

    def header(self, sequence: int) -> GroupHeader:
        """The header of one durable group.

        Raises:
            OffsetRetiredError: it is no longer kept.
        """
        with self._lock, self._telling():
            return self._header(sequence)

    def place(self, sequence: int) -> GroupPlace:
        """Where one durable group stands: by the index of a sealed segment, else by the group's header.

        Raises:
            OffsetRetiredError: it is no longer kept.
        """
        with self._lock, self._telling():
            first, _ = self._locate(sequence)
            if self._index is None or self._index[0] != first:
                with self._opened(first) as segment:
                    groups = _index(segment)
                if groups is None:
                    header = self._header(sequence)
                    return GroupPlace(**{name: getattr(header, name) for name in _PLACE})
                self._index = first, groups
            [row] = self._index[1].slice(sequence - first, 1).drop_columns("start").to_pylist()
        return GroupPlace(**row | {"position": Lsn(row["position"])})

    def read(self, *, after_sequence: int, max_changes: int | None = None) -> Iterator[StoredGroup]:
        """See `LogReader.read`; the end is that of this call, not of the first step."""
        end = self.end()
        check_not_ahead(after_sequence, end, where=str(self.folder))
        return self._read(after_sequence + 1, end.sequence, max_changes)

    def headers_backwards(self) -> Iterator[GroupHeader]:
        """Headers from the last group to the oldest that is kept."""
        last = self.end().sequence
        oldest = min(self._segments(), default=0)
        with self._telling(), _Opened(self._opened) as at:
            for sequence in range(last, oldest - 1, -1):
                try:
                    segment, start = self._find(sequence, at)
                    header = segment.frame(start, sequence=sequence).header()
                    at.close_after(segment.first)
                except OffsetRetiredError:
                    # It was retired since this began, and what is older with it.
                    return
                yield header

    def wait(self, *, after_sequence: int, timeout_s: float) -> bool:
        """See `LogReader.wait`; wakes within about a millisecond of an append by any process."""

        def has_more() -> bool:
            end = read_end(self.folder)
            return end is not None and end.count - 1 > after_sequence

        check_not_ahead(after_sequence, self.end(), where=str(self.folder))
        return wait_until(has_more, file=self.folder / END_FILE, timeout_s=timeout_s)

    def _read(self, sequence: int, last: int, max_changes: int | None) -> Iterator[StoredGroup]:
        previous: GroupHeader | None = None
        if sequence > min(segments(self.folder), default=0):
            # It may be retired at this moment; only the group that was asked for has to be there.
            with suppress(OffsetRetiredError):
                previous = self.header(sequence - 1)
        left = math.inf if max_changes is None else max(1, max_changes)
        taken_bytes = taken_changes = 0

        def wanted_bytes() -> float:
            return left * max(1, taken_bytes) / max(1, taken_changes)

        with self._telling(), _Opened(self._opened) as at:
            for run in checked(self._runs(at, sequence, last), wanted_bytes=wanted_bytes):
                at.close_before(run.segment.first)
                for frame, body in run.frames:
                    group = decode_frame(frame, body, self._schemas)
                    check_follows(
                        group.header,
                        sequence=sequence,
                        previous=previous,
                        where=str(self.folder),
                        mends_hole=next_step(self.folder),
                    )
                    yield group
                    previous, sequence = group.header, sequence + 1
                    changes = previous.next_offset - previous.offset
                    left, taken_changes = left - changes, taken_changes + changes
                    taken_bytes += frame.end - frame.start
                    if left <= 0:
                        return
                if run.fault is not None:
                    raise run.fault

    def _runs(self, at: "_Opened", sequence: int, last: int) -> Iterator[Run]:
        """Where the groups up to the last one lie; ends behind one that cannot be whole."""
        most_groups, window_bytes = 1, FIRST_BYTES
        # Whoever asks for the newest group, or for one, has nothing fetched for what comes after it.
        is_begun = False
        while sequence <= last:
            segment, start = self._find(sequence, at)
            if is_begun:
                self._expect_after(segment, last)
            is_within = True
            with self._lock:
                place = bisect_right(self._firsts, segment.first)
                # A segment ends where the next one begins: one that was restored may have the start of a transaction
                # behind that, whose other parts are lost.
                stop = min(last + 1, self._firsts[place]) if place < len(self._firsts) else last + 1
            while is_within:
                most_groups = min(most_groups, stop - sequence)
                if isinstance(segment.bytes, SealedBytes):
                    run = self._sealed_run(segment, segment.bytes.block_end(start), sequence, start, stop)
                else:
                    run = Run.of_plain(segment, sequence, start, most_groups=most_groups, window_bytes=window_bytes)
                yield run
                if run.is_broken:
                    return
                if not is_begun:
                    self._expect_after(segment, last)
                    is_begun = True
                is_small = (run.end - run.start) // run.groups < RUN_BYTES // 4
                most_groups, window_bytes = last + 1, RUN_BYTES if is_small else HEAD_BYTES
                start, sequence = run.end, sequence + run.groups
                is_within = sequence < stop and start < segment.bytes.size

    def _expect_after(self, segment: OpenSegment, last: int) -> None:
        """Have the segment behind one fetched ahead, where its groups are wanted and it is in the archive alone."""
        if self._archive is None:
            return
        with self._lock:
            place = bisect_right(self._firsts, segment.first)
            following = self._firsts[place] if place < len(self._firsts) else last + 1
        if following <= last and following in self._archive.firsts() and following not in segments(self.folder):
            self._archive.expect(following, beside=segment.first)

    def _sealed_run(self, segment: OpenSegment, end: int, sequence: int, start: int, stop: int) -> Run:
        """What is left of a block."""
        with self._lock:
            behind = segment.first + bisect_left(self._sealed_bounds(segment), end)
        groups = max(1, min(behind, stop) - sequence)
        return Run(segment=segment, sequence=sequence, groups=groups, start=start, end=end)

    def _header(self, sequence: int) -> GroupHeader:
        while True:
            first, start = self._locate(sequence)
            try:
                with self._opened(first) as segment:
                    if self._is_of(segment):
                        return segment.frame(start, sequence=sequence).header()
            except OffsetRetiredError as error:
                self._check_is_elsewhere(sequence, first, error)

    def _find(self, sequence: int, at: "_Opened") -> tuple[OpenSegment, int]:
        """The open segment of a durable group and the group's place in it."""
        while True:
            with self._lock:
                first, start = self._locate(sequence)
                try:
                    segment = at.segment(first)
                    if self._is_of(segment):
                        return segment, start
                except OffsetRetiredError as error:
                    self._check_is_elsewhere(sequence, first, error)
            # It may be the older file that is open.
            at.leave(first)

    def _check_is_elsewhere(self, sequence: int, first: int, error: OffsetRetiredError) -> None:
        """Forget a segment that is gone; raise where its groups were retired, and are not in another segment."""
        self._bounds.pop(first, None)
        self._firsts = self._segments()
        is_there = first in self._firsts or not self._firsts or sequence < self._firsts[0]
        if is_there or isinstance(error, ArchivedSegmentGoneError):
            raise error

    def _is_of(self, segment: OpenSegment) -> bool:
        """Whether what is known of a segment is of this file; it is forgotten where it is not."""
        bounds = self._bounds.get(segment.first)
        if bounds and bounds[-1] <= segment.bytes.size and self._inodes.get(segment.first) == segment.inode:
            return True
        self._bounds.pop(segment.first, None)
        self._index = None
        return False

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Leave word of a group that cannot be read to the one that may mend it."""
        try:
            yield
        except CorruptLogError as error:
            if error.sequence is not None:
                note_suspect(self.folder, error.sequence, str(error))
            raise

    def _locate(self, sequence: int) -> tuple[int, int]:
        """The segment (by its first sequence) and the place in it of a durable group."""
        for first in self._segments_with(sequence):
            try:
                bounds = self._scan(first, sequence)
            except ArchivedSegmentGoneError:
                raise
            except OffsetRetiredError:
                # The segment was the newest one that was known here; a fresh look finds what came after it.
                continue
            if sequence - first < len(bounds) - 1:
                return first, bounds[sequence - first]
        if self._firsts and sequence < self._firsts[0]:
            raise retired(self.folder, sequence, oldest=self._firsts[0])
        raise CorruptLogError(
            f"cannot find group {sequence} in {str(self.folder)!r} although it was durable; {next_step(self.folder)}",
            sequence=sequence,
        )

    def _segments_with(self, sequence: int) -> Iterator[int]:
        """The segment that should hold the group as far as is known, then after a fresh look."""
        for fresh in (False, True):
            if fresh:
                self._firsts = self._segments()
                for gone in self._bounds.keys() - set(self._firsts):
                    del self._bounds[gone]
            if place := bisect_right(self._firsts, sequence):
                yield self._firsts[place - 1]

    def _scan(self, first: int, sequence: int) -> "array[int]":
        """The bounds of the segment's frames, known up to `sequence` where the file goes that far."""
        bounds = self._bounds.setdefault(first, array("Q", [0]))
        if sequence - first < len(bounds) - 1:
            return bounds
        with self._opened(first) as segment:
            if isinstance(segment.bytes, SealedBytes):
                return self._sealed_bounds(segment)
            if self._inodes.get(first) != segment.inode or bounds[-1] > segment.bytes.size:
                bounds = self._bounds[first] = array("Q", [0])
                self._inodes[first] = segment.inode
            # Never looks behind `sequence`: what lies there may be in the middle of being written.
            while sequence - first >= len(bounds) - 1:
                try:
                    frame = read_frame(segment.bytes, bounds[-1])
                except BadFrameError as error:
                    raise corrupt(segment.path, bounds[-1], first + len(bounds) - 1, str(error)) from error
                if frame is None:
                    break
                bounds.append(frame.end)
        return bounds

    def _sealed_bounds(self, segment: OpenSegment) -> "array[int]":
        """The bounds of all frames of a sealed segment; it may have been a plain one when it was looked into before."""
        bounds, size = self._bounds.get(segment.first), segment.bytes.size
        if bounds is None or bounds[-1] != size or self._inodes.get(segment.first) != segment.inode:
            groups = _index(segment)
            starts = [] if groups is None else groups.column("start").to_pylist()
            bounds = self._bounds[segment.first] = array("Q", [*starts, size])
            self._inodes[segment.first] = segment.inode
        return bounds

    def _segments(self) -> list[int]:
        """The first sequence of each segment that is left, here or in the archive, in order."""
        here = segments(self.folder)
        return here if self._archive is None else sorted({*here, *self._archive.firsts()})

    @contextmanager
    def _opened(self, first: int) -> Iterator[OpenSegment]:
        """A segment for reading, from the archive where it is not here any more; raises like `opened`."""
        with ExitStack() as stack:
            yield self._open(first, stack)

    def _open(self, first: int, stack: ExitStack) -> OpenSegment:
        folder = self.folder
        for _ in range(_FETCH_TRIES):
            try:
                return stack.enter_context(opened(folder, first))
            except OffsetRetiredError:
                # A copy that was fetched may be gone again before it is opened, where the cache is small.
                if self._archive is None or first not in self._archive.firsts():
                    raise
                folder = self._archive.fetch(first)
        return stack.enter_context(opened(folder, first))

    def _forget(self, identity: tuple[int, int]) -> None:
        self._identity = identity
        self._end = EMPTY_END
        self._firsts = []
        self._bounds = {}
        self._inodes = {}
        self._index = None


class _Opened:
    """The segments that a reader is in, open as long as it is in them."""

    def __init__(self, opened: Callable[[int], AbstractContextManager[OpenSegment]]) -> None:
        self._opened = opened
        self._open: dict[int, tuple[OpenSegment, ExitStack]] = {}
        self._left: list[ExitStack] = []

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        for first in list(self._open):
            self._close(first)
        for stack in self._left:
            stack.close()

    def segment(self, first: int) -> OpenSegment:
        """The segment of that first group; raises like `opened`."""
        if first not in self._open:
            with ExitStack() as stack:
                segment = stack.enter_context(self._opened(first))
                self._open[first] = segment, stack.pop_all()
        return self._open[first][0]

    def leave(self, first: int) -> None:
        """Have that segment opened anew the next time; what is being read of it stays open until the end."""
        if first in self._open:
            self._left.append(self._open.pop(first)[1])

    def close_before(self, first: int) -> None:
        """Close those that only groups before that one are in."""
        for other in [other for other in self._open if other < first]:
            self._close(other)

    def close_after(self, first: int) -> None:
        """Close those that only groups after that segment's are in."""
        for other in [other for other in self._open if other > first]:
            self._close(other)

    def _close(self, first: int) -> None:
        _, stack = self._open.pop(first)
        stack.close()


def _index(segment: OpenSegment) -> pa.Table | None:
    """The index of a sealed segment; a plain one has none."""
    if not isinstance(segment.bytes, SealedBytes):
        return None
    try:
        return segment.bytes.groups()
    except BadFrameError as error:
        raise corrupt(segment.path, 0, segment.first, str(error)) from error


def _check_has_no_groups(folder: Path) -> None:
    has_groups = any(size_of(folder, first) for first in segments(folder))
    # A writer that opens a new log makes the file `end` before its first group, so look again.
    if has_groups and read_end(folder) is None:
        raise CorruptLogError(
            f"cannot read the log {str(folder)!r}: it has segments but no file {END_FILE!r}; "
            "start the writer, which finds the end in the segments"
        )
