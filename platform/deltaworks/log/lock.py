"""One writer of a log per machine: a lock that the kernel frees when its holder dies."""

import fcntl
import os
from pathlib import Path

from deltaworks.log.change_log import FencedError

LOCK_FILE = "lock"


def take_lock(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked, with this process's id in it; close it to let go.

    Raises:
        FencedError: another process holds it; the message has its id.
    """
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise FencedError(
            f"cannot write the log {str(folder)!r}: process {holder} holds it; stop that process or wait for it"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def replace_lock(folder: Path) -> None:
    """Put a free lock file in the place of one that is held; only for logs that fence their old writer themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{LOCK_FILE}.new"
    new.touch()
    new.replace(folder / LOCK_FILE)
