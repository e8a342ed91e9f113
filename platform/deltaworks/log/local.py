"""The change log on a local disk: segments of Arrow IPC, one sync per group. Written here, read by `local_reader`.

    folder/ 00000000000000000000.sealed    groups 0, 1, 2, …, compressed (see `sealing`)
            00000000000000018021.segment   frames of groups 18021, …     (see `segment`); the last one grows
            end                            how many groups are durable   (see `end_file`)
            lock                           held by the one writer, with its process id

    append:  write frame ─► fdatasync ─► publish in `end` ─► return
    died at          1             2                3          4
    1  a piece of a frame, or a whole one nobody was told of: cut, or kept and synced, by the next writer
    2  as 1     3  durable: the next writer publishes it     4  durable and seen; its caller was not told

Local means local: `flock`, `fdatasync` and the page cache must be those of one machine.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import pyarrow as pa
import structlog

from deltaworks import faults
from deltaworks.errors import DeltaworksError
from deltaworks.log.change_log import (
    EMPTY_END,
    CorruptLogError,
    FencedError,
    Group,
    GroupHeader,
    LogEnd,
    LogFailedError,
    LogFormatError,
    LogFullError,
    LogNotWritableError,
)
from deltaworks.log.end_file import NAME as END_FILE
from deltaworks.log.end_file import PublishedEnd, read_end, write_end
from deltaworks.log.full_disk import is_full, note_full, note_room
from deltaworks.log.header import check_follows, end_after, next_header
from deltaworks.log.local_reader import LocalLogReader
from deltaworks.log.lock import LOCK_FILE, take_lock
from deltaworks.log.sealing import Sealer
from deltaworks.log.segment import (
    MAGIC,
    BadFrameError,
    Frame,
    PlainBytes,
    encode_frame,
    frames,
    holds_frame_after,
    read_body,
)
from deltaworks.log.segment_file import corrupt, opened, sealed_name, segment_name, segments, sync_folder

__all__ = ["LOCK_FILE", "SEGMENT_BYTES", "LocalLogReader", "LocalLogWriter"]

SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""Where a segment ends: small enough to find the end of by its headers in about 0.1 s."""

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})

logger = structlog.get_logger(__name__)


class LocalLogWriter:
    """The one writer of a log folder; holds its lock until `close`, or until the process ends."""

    def __init__(
        self,
        folder: Path,
        *,
        lock: int,
        end_file: int,
        segment: "_Segment",
        end: LogEnd,
        epoch: int,
        segment_bytes: int,
        seal_level: int | None,
    ) -> None:
        """Use `open`."""
        self.folder = folder
        self.epoch = epoch
        self._lock = lock
        self._end_file = end_file
        self._segment = segment
        self._end = end
        self._segment_bytes = segment_bytes
        self._stopped: DeltaworksError | None = None
        self._sealer = Sealer(folder, seal_level) if seal_level is not None else None
        self._has_closed = True
        # A life before may have ended while the disk was full.
        self._is_full = is_full(folder)
        self._is_ending = False
        self._seal_some()

    @classmethod
    def open(cls, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, seal_level: int | None = None) -> Self:
        """Take the log: lock it, cut a torn tail, and raise the epoch durably.

        With a `seal_level`, of zstd, segments are sealed in the background once they are closed.

        Raises:
            FencedError: another writer holds the log; the message has its process id.
            CorruptLogError: a durable group is damaged or missing.
            LogFormatError: the files are foreign or of a newer version.
            LogNotWritableError: this process may not write there.
            LogFullError: no space to open it; later it may work.
            LogFailedError: the disk refuses.
        """
        with _refusals(folder):
            return cls._open(folder, segment_bytes, seal_level)

    @classmethod
    def _open(cls, folder: Path, segment_bytes: int, seal_level: int | None) -> Self:
        _create_folder(folder)
        lock = take_lock(folder)
        segment: _Segment | None = None
        try:
            published = _published_before(folder)
            segment, end = _recover(folder, published)
            epoch = max(published.epoch, end.epoch) + 1
            end_file = _create_end_file(folder, epoch=epoch, count=end.sequence + 1)
        except BaseException:
            if segment is not None:
                os.close(segment.descriptor)
            os.close(lock)
            raise
        return cls(
            folder,
            lock=lock,
            end_file=end_file,
            segment=segment,
            end=end,
            epoch=epoch,
            segment_bytes=segment_bytes,
            seal_level=seal_level,
        )

    def end(self) -> LogEnd:
        """The end after the last append of this writer."""
        return self._end

    def append(self, group: Group) -> GroupHeader:
        """See `LogWriter.append`: one write and one sync, then the group is durable and visible."""
        try:
            header = self._append(group)
        except LogFullError:
            self._is_full = True
            note_full(self.folder)
            raise
        if self._is_full:
            self._is_full = False
            note_room(self.folder)
        return header

    def _append(self, group: Group) -> GroupHeader:
        self._check_may_write()
        header = next_header(group, end=self._end, epoch=self.epoch, appended_at=datetime.now(UTC))
        frame = encode_frame(header, group.batches)
        byte_count = sum(memoryview(part).nbytes for part in frame)
        if self._segment.size and (self._is_ending or self._segment.size + byte_count > self._segment_bytes):
            self._start_segment(header.sequence)
        self._write(frame)
        self._sync(is_visible=not group.is_partial)
        # Whoever took the log over meanwhile copied its files before this group or with it: not ours to say.
        self._check_may_write()
        self._segment = replace(self._segment, size=self._segment.size + byte_count)
        self._end = end_after(header)
        if not group.is_partial:
            self._seal_some()
        return header

    def discard_partial(self) -> None:
        """See `LogWriter.discard_partial`."""
        if not self._end.is_partial:
            return
        self._check_may_write()
        os.close(self._segment.descriptor)
        self._segment, self._end = _recover(self.folder, _published_before(self.folder))

    def end_segment(self) -> None:
        """Let the next group begin a new segment, whatever there is in this one."""
        self._is_ending = True

    def close(self) -> None:
        """Let another writer in; a second call does nothing."""
        if isinstance(self._stopped, _ClosedError):
            return
        self._stopped = _ClosedError(
            f"cannot write the log {str(self.folder)!r}: this writer was closed; open it again"
        )
        if self._sealer is not None:
            self._sealer.close()
        for descriptor in (self._segment.descriptor, self._end_file, self._lock):
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seal_some(self) -> None:
        """Have a segment sealed that was closed since the last time."""
        if self._sealer is not None and self._has_closed:
            self._sealer.wake()
        self._has_closed = False

    def _check_may_write(self) -> None:
        if self._stopped is not None:
            raise self._stopped
        published = read_end(self.folder)
        if published is None or published.epoch != self.epoch:
            # The lock makes this impossible unless somebody removed or replaced the folder's files.
            newer = "none" if published is None else published.epoch
            raise FencedError(
                f"cannot write the log {str(self.folder)!r} with epoch {self.epoch!r}: its epoch is now {newer!r}; "
                "stop this writer, another one has the log"
            )

    def _start_segment(self, first_sequence: int) -> None:
        with self._full_if_no_space():
            segment = _create_segment(self.folder, first_sequence)
        if os.fstat(segment.descriptor).st_size:
            os.close(segment.descriptor)
            raise FencedError(
                f"cannot start {str(self.folder / segment_name(first_sequence))!r}: another writer has begun it"
            )
        os.close(self._segment.descriptor)
        self._segment = segment
        self._has_closed, self._is_ending = True, False

    def _write(self, frame: tuple[bytes, pa.Buffer]) -> None:
        try:
            with self._full_if_no_space():
                faults.reach("log.before_write")
                _write_all(self._segment.descriptor, frame, self._segment.size)
                faults.reach("log.after_write")
        except LogFullError:
            self._cut_back()
            raise

    def _sync(self, *, is_visible: bool) -> None:
        try:
            faults.reach("log.before_fsync")
            os.fdatasync(self._segment.descriptor)
            faults.reach("log.after_fsync")
            # A part of a transaction is durable and not seen before the last one is, and then all are.
            if is_visible:
                faults.reach("log.before_publish")
                write_end(self._end_file, epoch=self.epoch, count=self._end.sequence + 2)
                faults.reach("log.after_publish")
        except OSError as error:
            # After a failed sync the kernel may drop the dirty pages and report success the next time
            # (fsync(2), "EIO"), so this file handle can never promise anything again.
            raise self._fail("sync", error) from error

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._segment.descriptor, self._segment.size)
        except OSError as error:
            raise self._fail("cut back", error) from error

    @contextmanager
    def _full_if_no_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise LogFullError(
                    f"cannot append to the log {str(self.folder)!r}: {error.strerror}; free space, then the same "
                    "append works, nothing was lost"
                ) from error
            raise self._fail("write", error) from error

    def _fail(self, what: str, error: OSError) -> LogFailedError:
        self._stopped = LogFailedError(
            f"cannot {what} {str(self.folder / segment_name(self._segment.first_sequence))!r}: {error.strerror}; "
            "check the disk, then start the writer again: it keeps every group that was durable"
        )
        return self._stopped


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Say by name why the disk does not let a writer open the log."""
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            raise LogNotWritableError(
                f"cannot write the log {str(folder)!r}: {error.strerror}; let this user write there, or set home in "
                "deltaworks.yaml to a folder where it may"
            ) from error
        if error.errno in _NO_SPACE:
            raise LogFullError(f"cannot open the log {str(folder)!r}: {error.strerror}; free space") from error
        raise LogFailedError(
            f"cannot open the log {str(folder)!r}: {error.strerror}; check the disk, then start the writer again"
        ) from error


class _ClosedError(FencedError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """The segment being written; `size` is where its last whole frame ends."""

    first_sequence: int
    descriptor: int
    size: int


def _recover(folder: Path, published: PublishedEnd) -> tuple[_Segment, LogEnd]:
    """Cut what was never acknowledged, make the rest durable, and return where to go on."""
    known = segments(folder)
    while known:
        first = known[-1]
        if not (folder / segment_name(first)).exists():
            raise CorruptLogError(
                f"cannot open the log {str(folder)!r}: {sealed_name(first)} is its last segment, and was sealed when "
                "groups behind it were durable; restore the log from a copy, or remove it and dump the source again"
            )
        segment, end = _recover_segment(folder, first, published)
        if end is None and first > 0:
            # The writer died between creating the segment and its first group, or within a transaction.
            last = _last_header(folder, known[-2], first - 1)
            end = None if last.is_partial else end_after(last)
        if end is not None or first == 0:
            end = end or EMPTY_END
            _check_count(folder, published, found=end.sequence + 1)
            return segment, end
        os.close(segment.descriptor)
        os.unlink(folder / segment_name(first))
        sync_folder(folder)
        known.pop()
    _check_count(folder, published, found=0)
    return _create_segment(folder, 0), EMPTY_END


def _recover_segment(folder: Path, first: int, published: PublishedEnd) -> tuple[_Segment, LogEnd | None]:
    """A segment without its torn tail and the parts of an unfinished transaction; `None` when nothing is left."""
    path = folder / segment_name(first)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found, size = _whole_frames(descriptor, path, first, published.count)
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
    segment = _Segment(first_sequence=first, descriptor=descriptor, size=size)
    if not found:
        return segment, None
    last = found[-1].header()
    check_follows(last, sequence=first + len(found) - 1, previous=None, where=str(folder))
    return segment, end_after(last)


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
        if found and found[-1].start == at:
            found.pop()
        if first + len(found) < durable_count or holds_frame_after(source, at):
            raise corrupt(path, at, first + len(found), str(error)) from error
        head = os.pread(descriptor, len(MAGIC), at)
        if at == 0 and not MAGIC.startswith(head) and head.strip(b"\0"):
            raise LogFormatError(
                f"cannot use {str(path)!r}: it is not a segment of a change log; move it out of the log's folder"
            ) from error
    return found, at


def _last_header(folder: Path, first: int, sequence: int) -> GroupHeader:
    with opened(folder, first) as segment:
        at, number = 0, first
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
        raise CorruptLogError(
            f"cannot open the log {str(folder)!r}: {published.count} groups were durable, {found} are left; "
            "restore the log from a copy, or remove it and dump the source again"
        )


def _published_before(folder: Path) -> PublishedEnd:
    return read_end(folder) or PublishedEnd(epoch=0, count=0)


def _create_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _create_end_file(folder: Path, *, epoch: int, count: int) -> int:
    """The open `end` file, its epoch durable. Overwritten in place: readers know the log by its inode."""
    path = folder / END_FILE
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        write_end(descriptor, epoch=epoch, count=count)
        os.fsync(descriptor)
        if is_new:
            sync_folder(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _create_segment(folder: Path, first_sequence: int) -> _Segment:
    # A file of that name is one that an earlier try created and could not fill.
    descriptor = os.open(folder / segment_name(first_sequence), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # The name must be durable before a group in the file can be.
        sync_folder(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return _Segment(first_sequence=first_sequence, descriptor=descriptor, size=0)


def _write_all(descriptor: int, parts: Sequence[bytes | pa.Buffer], at: int) -> None:
    left = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    while left:
        count = os.pwritev(descriptor, left, at)
        at += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
