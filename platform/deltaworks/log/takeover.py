"""Takes a local log away from a writer that lost its lease and still has its lock, e.g. because it was stopped.

The kernel frees a dead process's lock, never that of one which stands still. Such a writer wakes up in the
middle of anything, also between looking at the epoch and writing. So every file that it has open is replaced
by a copy under the same name: what it writes then goes to files that nobody can find any more.

    end       copied first, with a higher epoch: from here on it refuses its own appends
    segment   the last one, copied to its last byte; the next writer cuts a frame that was only written in part
    lock      a new file, free to be locked

Call it only after the writer was cut off from its source. An append that it was in the middle of may be in the
copy or not; either way it was not confirmed to the source, so it comes again.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from deltaworks.log.change_log import FencedError
from deltaworks.log.end_file import NAME as END_FILE
from deltaworks.log.end_file import read_end, read_last, write_end
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE
from deltaworks.log.segment import encode_head
from deltaworks.log.segment_file import segment_name, segments, sync_folder

TAKEOVER_FILE = "takeover"

logger = structlog.get_logger(__name__)


def take_over(folder: Path) -> None:
    """Make every writer of this log harmless, so that a new one can open it.

    Raises:
        FencedError: another process takes it over at this moment.
    """
    guard = os.open(folder / TAKEOVER_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FencedError(f"cannot take over the log {str(folder)!r}: another process is at it") from error
        logger.warning("a log is taken over", folder=str(folder), holder=holder_of(folder / LOCK_FILE))
        _replace(folder / END_FILE, lambda path: _write_end(folder, path))
        known = segments(folder)
        # What is sealed, no writer has open.
        if known and (last := folder / segment_name(known[-1])).exists():
            _replace(last, lambda path: shutil.copyfile(last, path))
        _replace(folder / LOCK_FILE, Path.touch)
    finally:
        os.close(guard)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put a new file in the place of one, durably; whoever has the old one open keeps that."""
    new = path.with_name(f"{path.name}.new")
    make(new)
    descriptor = os.open(new, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(path)
    sync_folder(path.parent)


def _write_end(folder: Path, path: Path) -> None:
    published = read_end(folder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        epoch, count = (published.epoch, published.count) if published is not None else (0, 0)
        last = read_last(folder)
        write_end(descriptor, epoch=epoch + 1, count=count, last=b"" if last is None else encode_head(last))
    finally:
        os.close(descriptor)
