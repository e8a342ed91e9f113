"""The published end of a local log: how many groups are durable, and whose turn it is.

The writer publishes after the sync, so a reader never acts on a group that a power cut could still
take away. Publishing is a plain overwrite of one small file and is not synced: after a power cut the
count may be too small (the writer then finds the groups behind it), never too large. So whatever of
those groups cannot be read is damage, and never a torn tail.

    magic "DWLE", crc32 of the next two, epoch, count      4s u32 u64 u64
    head of the last group's frame                         see `segment`; it has a checksum of its own

The head is what the end of the log is known by where the last group itself is damaged: its place, and
capture's progress. Older versions neither write nor read it.
"""

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from isal.isal_zlib import crc32

from deltaworks.log.change_log import CorruptLogError, GroupHeader, LogFormatError
from deltaworks.log.segment import BadFrameError, LoadedBytes, read_head

NAME = "end"

_RECORD = struct.Struct("<4sIQQ")
_CHECKED = struct.Struct("<QQ")
_MAGIC = b"DWLE"
_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedEnd:
    """`count` groups are durable; `epoch` is the newest writer's. `identity` differs for another log."""

    epoch: int
    count: int
    identity: tuple[int, int] = (0, 0)


def read_end(folder: Path) -> PublishedEnd | None:
    """The published end, or `None` for a log that no writer has opened yet.

    Raises:
        CorruptLogError: the file is damaged.
    """
    # The writer asks twice for each group, and to join two paths takes as long as to read the file.
    path = f"{folder}/{NAME}"
    for _ in range(_TRIES):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            record = os.pread(descriptor, _RECORD.size, 0)
        finally:
            os.close(descriptor)
        if (end := _decode(record, (status.st_dev, status.st_ino))) is not None:
            return end
        # A read may meet an overwrite half way; the checksum tells, and the next read is whole.
        time.sleep(0.001)
    raise CorruptLogError(
        f"cannot read {path!r}: it fails its checksum; remove that file and start the writer, "
        "which finds the end in the segments"
    )


def read_last(folder: Path) -> GroupHeader | None:
    """The header of the last durable group as it was published; `None` where that is not known.

    Raises:
        CorruptLogError: the file is damaged.
    """
    published = read_end(folder)
    if published is None:
        return None
    content = (folder / NAME).read_bytes()[_RECORD.size :]
    try:
        frame = read_head(LoadedBytes(pa.py_buffer(content), start=0), 0)
    except (BadFrameError, LogFormatError):
        return None
    header = None if frame is None else frame.header()
    # An older version, or a power cut, leaves the head of another group there.
    return header if header is not None and header.sequence == published.count - 1 else None


def write_end(descriptor: int, *, epoch: int, count: int, last: bytes = b"") -> None:
    """Publish; readers in other processes see it, and `wait` wakes.

    `last` is the head of the last group's frame; left out where it is the one of before.
    """
    checked = _CHECKED.pack(epoch, count)
    os.pwrite(descriptor, _MAGIC + crc32(checked).to_bytes(4, "little") + checked + last, 0)


def _decode(record: bytes, identity: tuple[int, int]) -> PublishedEnd | None:
    if len(record) < _RECORD.size:
        return None
    magic, crc, epoch, count = _RECORD.unpack(record)
    if magic != _MAGIC or crc32(record[8:]) != crc:
        return None
    return PublishedEnd(epoch=epoch, count=count, identity=identity)
