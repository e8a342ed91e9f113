"""The published end of a local log: how many groups are durable, and whose turn it is.

The writer publishes after the sync, so a reader never acts on a group that a power cut could still
take away. Publishing is a plain overwrite of one small file and is not synced: after a power cut the
count may be too small (the writer then finds the groups behind it), never too large.

    magic "DWLE", crc32 of the rest, epoch, count          4s u32 u64 u64
"""

import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from deltaworks.log.change_log import CorruptLogError

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
    for _ in range(_TRIES):
        try:
            descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
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
        f"cannot read {str(folder / NAME)!r}: it fails its checksum; remove that file and start the writer, "
        "which finds the end in the segments"
    )


def write_end(descriptor: int, *, epoch: int, count: int) -> None:
    """Publish; readers in other processes see it, and `wait` wakes."""
    checked = _CHECKED.pack(epoch, count)
    os.pwrite(descriptor, _MAGIC + zlib.crc32(checked).to_bytes(4, "little") + checked, 0)


def _decode(record: bytes, identity: tuple[int, int]) -> PublishedEnd | None:
    if len(record) < _RECORD.size:
        return None
    magic, crc, epoch, count = _RECORD.unpack(record)
    if magic != _MAGIC or zlib.crc32(record[8:]) != crc:
        return None
    return PublishedEnd(epoch=epoch, count=count, identity=identity)
