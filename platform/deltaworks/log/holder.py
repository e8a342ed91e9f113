"""Who holds a lock file, asked without touching the lock.

Trying the lock to see whether it is free would make a writer that starts at that moment believe it
is taken. The kernel lists all locks in `/proc/locks`:

    1: FLOCK  ADVISORY  WRITE 4711 fe:01:131074 0 EOF
"""

import os
from pathlib import Path

LOCKS = Path("/proc/locks")


def holder_of(lock_file: Path) -> int | None:
    """The id of the process that holds the exclusive `flock` of this file, or `None`.

    A process outside of our pid namespace counts as 0.
    """
    try:
        facts = lock_file.stat()
        wrote = lock_file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}"
    for line in LOCKS.read_text(encoding="ascii").splitlines():
        # Waiting processes have a `->` after the number; they hold nothing.
        words = line.split()
        if words[1:4] != ["FLOCK", "ADVISORY", "WRITE"]:
            continue
        on, _, inode = words[5].rpartition(":")
        # Overlay and btrfs show another device here than `stat` does; there the pid in the file decides.
        if inode == str(facts.st_ino) and (on == device or words[4] == wrote):
            return max(0, int(words[4]))
    return None
