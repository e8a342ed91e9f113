"""What a crash left of a local log, when its next writer opens it: cut, kept, or damage.

    behind the published end, whole                        kept, and synced
    behind the published end, and nothing whole behind it  a torn tail: cut
    anything else that cannot be read                      damage to what was durable: never cut, but mended (see
                                                           `mending.LocalMending.mend_end`) or refused

After a power cut the published end may be an older one: damage up to the very last group is then cut too, and the
source is ahead of the log, which capture finds.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from deltaworks.log.change_log import EMPTY_END, CorruptLogError, GroupHeader, LogEnd, LogFormatError
from deltaworks.log.end_file import PublishedEnd
from deltaworks.log.header import BEGIN_ANEW, check_follows, end_after
from deltaworks.log.segment import MAGIC, BadFrameError, Frame, PlainBytes, frames, holds_frame_after, read_body
from deltaworks.log.segment_file import corrupt, next_step, opened, sealed_name, segment_name, segments, sync_folder

MendEnd = Callable[[int], None]
"""Makes durable groups from that one on readable again, or named gaps; raises where it cannot."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowingSegment:
    """The last segment, open to be written; `size` is where its last whole frame ends."""

    first_sequence: int
    descriptor: int
    size: int


def recover(folder: Path, published: PublishedEnd, mend_end: MendEnd | None) -> tuple[GrowingSegment, LogEnd]:
    """Cut what was never acknowledged, make the rest durable, and return where to go on.

    For the one that holds the log. `mend_end` is called with the first durable group that is damaged or missing; after
    each that it mends, it is all looked at once more.

    Raises:
        CorruptLogError: a durable group is damaged or missing, and is not mended.
        LogFormatError: the files are foreign or of a newer version.
        OSError: the disk refuses.
    """
    mended: set[int] = set()
    while True:
        try:
            return _recover(folder, published)
        except CorruptLogError as error:
            if mend_end is None or error.sequence is None or error.sequence in mended:
                raise
            logger.error("the end of a log is damaged", log=folder.name, error=str(error))
            mend_end(error.sequence)
            mended.add(error.sequence)


def create_segment(folder: Path, first_sequence: int) -> GrowingSegment:
    """The segment that begins with a group, its name durable; its file is taken as it is where there is one.

    Raises:
        OSError: the disk refuses.
    """
    # A file of that name is one that an earlier try created and could not fill.
    descriptor = os.open(folder / segment_name(first_sequence), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # The name must be durable before a group in the file can be.
        sync_folder(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return GrowingSegment(first_sequence=first_sequence, descriptor=descriptor, size=0)


def _recover(folder: Path, published: PublishedEnd) -> tuple[GrowingSegment, LogEnd]:
    known = segments(folder)
    while known:
        first = known[-1]
        if not (folder / segment_name(first)).exists():
            raise CorruptLogError(
                f"cannot open the log {str(folder)!r}: {sealed_name(first)} is its last segment, and was sealed when "
                f"groups behind it were durable; {next_step(folder)}",
                sequence=max(first, published.count - 1),
            )
        segment, end = _recover_segment(folder, first, published)
        try:
            if end is None and first > 0:
                # The writer died between creating the segment and its first group, or within a transaction.
                last = _last_header(folder, known, first - 1)
                end = None if last.is_partial else end_after(last)
            if end is not None or first == 0:
                return segment, end or EMPTY_END
        except BaseException:
            os.close(segment.descriptor)
            raise
        os.close(segment.descriptor)
        os.unlink(folder / segment_name(first))
        sync_folder(folder)
        known.pop()
    _check_count(folder, published, found=0)
    return create_segment(folder, 0), EMPTY_END


def _recover_segment(folder: Path, first: int, published: PublishedEnd) -> tuple[GrowingSegment, LogEnd | None]:
    """A segment without its torn tail and the parts of an unfinished transaction; `None` when nothing is left."""
    path = folder / segment_name(first)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found, size = _whole_frames(descriptor, path, first, published.count)
        # Before anything is cut: the parts of a transaction whose last one is lost are durable.
        _check_count(folder, published, found=first + len(found))
        _check_places(path, first, found)
        while found and found[-1].header().is_partial:
            size = found.pop().start
        if os.fstat(descriptor).st_size > size:
            logger.warning("cut an unfinished tail off the log", segment=path.name, sequence=first + len(found))
            os.ftruncate(descriptor, size)
        # A whole frame may have been written but not synced when its writer died.
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    segment = GrowingSegment(first_sequence=first, descriptor=descriptor, size=size)
    if not found:
        return segment, None
    last = found[-1].header()
    check_follows(last, sequence=first + len(found) - 1, previous=None, where=str(folder))
    return segment, end_after(last)


def _check_places(path: Path, first: int, found: Sequence[Frame]) -> None:
    """Whether every group is where it belongs; one that nobody was told of may stand where a durable one is missing."""
    if not found or found[-1].header().sequence == first + len(found) - 1:
        return
    for sequence, frame in enumerate(found, first):
        if frame.header().sequence != sequence:
            raise corrupt(path, frame.start, sequence, f"group {frame.header().sequence} lies in its place")


def _whole_frames(descriptor: int, path: Path, first: int, durable_count: int) -> tuple[list[Frame], int]:
    """The last segment's whole frames and where they end; a bad one is a torn tail or it is damage."""
    source = PlainBytes(descriptor)
    found: list[Frame] = []
    at = 0
    try:
        for frame in frames(source):
            found.append(frame)
            at = frame.end
        if found:
            # Only the last frame can be torn: each was durable before the next was begun.
            at = found[-1].start
            read_body(source, found[-1])
            at = found[-1].end
    except BadFrameError as error:
        if found and (found[-1].start == at or _hides_a_frame(source, found[-1])):
            at = found.pop().start
        if first + len(found) < durable_count or holds_frame_after(source, at):
            raise corrupt(path, at, first + len(found), str(error)) from error
        head = os.pread(descriptor, len(MAGIC), at)
        # Behind a group of ours it is what a crash left: the file has the name of the next segment.
        if at == first == 0 and not MAGIC.startswith(head) and head.strip(b"\0"):
            raise LogFormatError(
                f"cannot use {str(path)!r}: it is not a segment of a change log; move it out of the log's folder"
            ) from error
    return found, at


def _hides_a_frame(source: PlainBytes, frame: Frame) -> bool:
    """Whether bytes of a frame are missing, so that a whole one lies where its body should be."""
    try:
        read_body(source, frame)
    except BadFrameError:
        return holds_frame_after(source, frame.start)
    return False


def _last_header(folder: Path, known: Sequence[int], sequence: int) -> GroupHeader:
    """The header of the last group of the last segment but one."""
    if len(known) < 2:
        raise CorruptLogError(
            f"cannot open the log {str(folder)!r}: {segment_name(known[-1])} is its only segment, and group {sequence} "
            f"was durable before it; {next_step(folder)}",
            sequence=sequence,
        )
    with opened(folder, known[-2]) as segment:
        at, number = 0, known[-2]
        try:
            for frame in frames(segment.bytes):
                if number == sequence:
                    return frame.header()
                at, number = frame.end, number + 1
        except BadFrameError as error:
            raise corrupt(segment.path, at, number, str(error)) from error
        raise corrupt(segment.path, at, number, "the segment ends early")


def _check_count(folder: Path, published: PublishedEnd, *, found: int) -> None:
    if found < published.count:
        is_there = bool(segments(folder))
        raise CorruptLogError(
            f"cannot open the log {str(folder)!r}: {published.count} groups were durable, {found} are left; "
            f"{next_step(folder) if is_there else BEGIN_ANEW}",
            # Where none is here the archive may have the last one.
            sequence=found if is_there else published.count - 1,
        )
