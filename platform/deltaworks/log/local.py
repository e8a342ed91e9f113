"""The change log on a local disk: segments of Arrow IPC, one sync per group. Written here, read by `local_reader`.

    folder/ 00000000000000000000.sealed    groups 0, 1, 2, …, compressed (see `sealing`)
            00000000000000018021.segment   frames of groups 18021, …     (see `segment`); the last one grows
            end                            how many groups are durable   (see `end_file`)
            lock                           held by the one writer, with its process id

    append:  write frame ─► fdatasync ─► publish in `end` ─► return
    died at          1             2                3          4
    1  a piece of a frame, or a whole one nobody was told of: cut, or kept and synced, by the next writer
    2  as 1     3  durable: the next writer publishes it     4  durable and seen; its caller was not told

What is cut or kept, and what is damage, `recovery` decides.

Local means local: `flock`, `fdatasync` and the page cache must be those of one machine.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import pyarrow as pa

from deltaworks import faults
from deltaworks.errors import DeltaworksError
from deltaworks.log.change_log import (
    FencedError,
    Group,
    GroupHeader,
    LogEnd,
    LogFailedError,
    LogFullError,
    LogNotWritableError,
)
from deltaworks.log.end_file import NAME as END_FILE
from deltaworks.log.end_file import PublishedEnd, read_end, read_last, write_end
from deltaworks.log.full_disk import is_full, note_full, note_room
from deltaworks.log.header import end_after, next_header
from deltaworks.log.local_reader import LocalLogReader
from deltaworks.log.lock import LOCK_FILE, take_lock
from deltaworks.log.recovery import GrowingSegment, MendEnd, create_segment, recover
from deltaworks.log.sealing import Sealer
from deltaworks.log.segment import encode_frame, encode_head
from deltaworks.log.segment_file import segment_name, sync_folder

__all__ = ["LOCK_FILE", "SEGMENT_BYTES", "LocalLogReader", "LocalLogWriter"]

SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""Where a segment ends: small enough to find the end of by its headers in about 0.1 s."""

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})


class LocalLogWriter:
    """The one writer of a log folder; holds its lock until `close`, or until the process ends."""

    def __init__(
        self,
        folder: Path,
        *,
        lock: int,
        end_file: int,
        segment: GrowingSegment,
        end: LogEnd,
        epoch: int,
        segment_bytes: int,
        seal_level: int | None,
        mend_end: MendEnd | None,
    ) -> None:
        """Use `open`."""
        self.folder = folder
        self.epoch = epoch
        self._lock = lock
        self._end_file = end_file
        self._segment = segment
        self._end = end
        self._segment_bytes = segment_bytes
        self._mend_end = mend_end
        self._stopped: DeltaworksError | None = None
        self._sealer = Sealer(folder, seal_level) if seal_level is not None else None
        self._has_closed = True
        # A life before may have ended while the disk was full.
        self._is_full = is_full(folder)
        self._is_ending = False
        self._seal_some()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        seal_level: int | None = None,
        mend_end: MendEnd | None = None,
    ) -> Self:
        """Take the log: lock it, cut a torn tail, and raise the epoch durably.

        With a `seal_level`, of zstd, segments are sealed in the background once they are closed. `mend_end` is called
        with the first durable group that is damaged or missing at the log's end.

        Raises:
            FencedError: another writer holds the log; the message has its process id.
            CorruptLogError: a durable group is damaged or missing, and is not mended.
            LogFormatError: the files are foreign or of a newer version.
            LogNotWritableError: this process may not write there.
            LogFullError: no space to open it; later it may work.
            LogFailedError: the disk refuses.
        """
        with _refusals(folder):
            return cls._open(folder, segment_bytes, seal_level, mend_end)

    @classmethod
    def _open(cls, folder: Path, segment_bytes: int, seal_level: int | None, mend_end: MendEnd | None) -> Self:
        _create_folder(folder)
        lock = take_lock(folder)
        segment: GrowingSegment | None = None
        try:
            published = _published_before(folder)
            segment, end = recover(folder, published, mend_end)
            epoch = max(published.epoch, end.epoch) + 1
            end_file = _create_end_file(folder, epoch=epoch, end=end)
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
            mend_end=mend_end,
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
        self._sync(head=None if group.is_partial else frame[0])
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
        self._segment, self._end = recover(self.folder, _published_before(self.folder), self._mend_end)

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
            segment = create_segment(self.folder, first_sequence)
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

    def _sync(self, *, head: bytes | None) -> None:
        """Make the group durable, and visible where its frame's head is given."""
        try:
            faults.reach("log.before_fsync")
            os.fdatasync(self._segment.descriptor)
            faults.reach("log.after_fsync")
            # A part of a transaction is durable and not seen before the last one is, and then all are.
            if head is not None:
                faults.reach("log.before_publish")
                write_end(self._end_file, epoch=self.epoch, count=self._end.sequence + 2, last=head)
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


def _published_before(folder: Path) -> PublishedEnd:
    return read_end(folder) or PublishedEnd(epoch=0, count=0)


def _create_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _create_end_file(folder: Path, *, epoch: int, end: LogEnd) -> int:
    """The open `end` file, its epoch durable. Overwritten in place: readers know the log by its inode."""
    path = folder / END_FILE
    is_new = not path.exists()
    last = _published_head(folder, end)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        write_end(descriptor, epoch=epoch, count=end.sequence + 1, last=last)
        os.fsync(descriptor)
        if is_new:
            sync_folder(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _published_head(folder: Path, end: LogEnd) -> bytes:
    """The head of the last group's frame, nothing where `end` has it already."""
    known = read_last(folder)
    if end.sequence < 0 or (known is not None and known.sequence == end.sequence):
        return b""
    return encode_head(LocalLogReader(folder).header(end.sequence))


def _write_all(descriptor: int, parts: Sequence[bytes | pa.Buffer], at: int) -> None:
    left = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    while left:
        count = os.pwritev(descriptor, left, at)
        at += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
