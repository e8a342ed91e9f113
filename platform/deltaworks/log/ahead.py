"""Reads a log ahead of whoever takes its groups: the next ones are read and checked while the last ones are worked on.

    plan    where whole frames begin and end     ─► runs: some frames that lie together, about a megabyte
    check   read, decompress, compare checksums  ─► in two threads, side by side: none of it holds Python's lock
    take    in order, what is damaged in its turn

The first run is the first group alone and is read at once, so a reader that waits for the newest group has it as
soon as without all this; where one more run is all that follows, no thread is started either.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Self

import pyarrow as pa

from deltaworks.log.change_log import CorruptLogError, LogFormatError
from deltaworks.log.segment import BadFrameError, Frame, LoadedBytes, frame_end, read_body, read_frame
from deltaworks.log.segment_file import OpenSegment, corrupt

RUN_BYTES = 1 << 20
"""How many bytes of small groups are one run; a larger group, or a block of a sealed segment, is a run by itself."""

FIRST_BYTES, HEAD_BYTES = 1 << 16, 1 << 12
"""How many bytes are looked at for the first group, which is mostly smaller, and of one that is likely to be larger."""

AHEAD_BYTES = 16 << 20
"""What is read ahead at most, as appended, and one group or block of a sealed segment more."""

THREADS = 2
"""zlib checks about as much a second as zstd decompresses; more would only wait for the one that takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """So many `groups` between two bytes of a segment, the first one of that `sequence`; `content` if read already."""

    segment: OpenSegment
    sequence: int
    groups: int
    start: int
    end: int
    content: LoadedBytes | None = None
    is_broken: bool = False

    @classmethod
    def of_plain(cls, segment: OpenSegment, sequence: int, start: int, *, most_groups: int, window_bytes: int) -> Self:
        """Whole frames that lie in a window, or the one frame that is larger."""
        source = segment.bytes
        size = source.size
        content = LoadedBytes(source.load(start, min(size, start + window_bytes)), start=start)
        end, groups = start, 0
        while groups < most_groups and (following := frame_end(content, end)) is not None and following <= content.size:
            end, groups = following, groups + 1
        if groups:
            return cls(segment=segment, sequence=sequence, groups=groups, start=start, end=end, content=content)
        whole = frame_end(content, start)
        # What is wrong with a frame is found when it is read, after all that is before it.
        is_broken = whole is None or whole > size
        end = size if whole is None else min(whole, size)
        return cls(segment=segment, sequence=sequence, groups=1, start=start, end=max(start, end), is_broken=is_broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """The frames of a run whose checksums are right, with their bodies, up to the first one of which that is not so."""

    segment: OpenSegment
    frames: list[tuple[Frame, pa.Buffer]]
    fault: CorruptLogError | LogFormatError | None = None


def check_run(run: Run) -> CheckedRun:
    """Read a run and compare its checksums."""
    segment, start, sequence = run.segment, run.start, run.sequence
    frames: list[tuple[Frame, pa.Buffer]] = []
    try:
        content = run.content or LoadedBytes(segment.bytes.load(start, run.end), start=start)
        while len(frames) < run.groups:
            frame = read_frame(content, start)
            if frame is None:
                raise BadFrameError("the file ends there")
            is_checked = segment.bytes.checks_itself
            frames.append(
                (frame, content.load(frame.body_start, frame.end) if is_checked else read_body(content, frame))
            )
            start, sequence = frame.end, sequence + 1
    except BadFrameError as error:
        return CheckedRun(segment=segment, frames=frames, fault=corrupt(segment.path, start, sequence, str(error)))
    except LogFormatError as error:
        return CheckedRun(segment=segment, frames=frames, fault=error)
    return CheckedRun(segment=segment, frames=frames)


def checked(runs: Iterator[Run], *, wanted_bytes: Callable[[], float]) -> Iterator[CheckedRun]:
    """The runs, checked, in order; `wanted_bytes` says how much more will be asked for, as far as that is known.

    What goes wrong while a run is looked for is raised in its turn, after all runs before it.
    """
    planned = _in_turn(runs)
    first = next(planned, None)
    if first is None:
        return
    yield _check_planned(first)
    following = list(islice(planned, 2))
    if len(following) < 2:
        yield from map(_check_planned, following)
        return
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
    try:
        yield from _checked_in(pool, chain(following, planned), wanted_bytes)
    finally:
        # Whoever reads on closes the files after this.
        pool.shutdown(cancel_futures=True)


def _checked_in(
    pool: ThreadPoolExecutor, planned: Iterator[Run | Exception], wanted_bytes: Callable[[], float]
) -> Iterator[CheckedRun]:
    ahead: deque[tuple[int, Future[CheckedRun]]] = deque()
    ahead_bytes = 0
    while True:
        allowed = min(AHEAD_BYTES, wanted_bytes())
        while not ahead or ahead_bytes < allowed:
            run = next(planned, None)
            if run is None:
                break
            size = run.end - run.start if isinstance(run, Run) else 0
            ahead.append((size, pool.submit(_check_planned, run)))
            ahead_bytes += size
        if not ahead:
            return
        size, future = ahead.popleft()
        ahead_bytes -= size
        yield future.result()


def _check_planned(run: Run | Exception) -> CheckedRun:
    if isinstance(run, Exception):
        raise run
    return check_run(run)


def _in_turn(runs: Iterator[Run]) -> Iterator[Run | Exception]:
    try:
        yield from runs
    except Exception as error:
        yield error
