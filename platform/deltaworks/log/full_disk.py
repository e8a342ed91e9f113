"""Whether the disk of a log is full: said by its writer in a small file, and seen by whoever asks.

    log/<source>/full    when appends were refused for want of room; removed by the first that works again

A partial write is cut off again before the file is written, so nearly always there is room for it; where there is none
at all, the file system itself says so.
"""

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

NO_ROOM_BYTES = 64 << 10
"""With less than this nothing that is worth a group fits."""

_FILE = "full"


def note_full(folder: Path) -> None:
    """Leave word that appends are refused; never raises."""
    with suppress(OSError):
        (folder / _FILE).write_text(datetime.now(UTC).isoformat(timespec="seconds"), encoding="utf-8")


def note_room(folder: Path) -> None:
    """Take it back; never raises."""
    with suppress(OSError):
        (folder / _FILE).unlink()


def is_full(folder: Path) -> bool:
    """Whether appends to the log in this folder are refused, or would be."""
    if (folder / _FILE).exists():
        return True
    with suppress(OSError):
        disk = os.statvfs(folder)
        # Some file systems have no limit of their own, and say 0 blocks.
        return disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < NO_ROOM_BYTES
    return False
