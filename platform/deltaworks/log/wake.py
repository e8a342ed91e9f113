"""Sleep until a file is written to, by any process.

Linux tells through inotify(7), which costs nothing while idle. Elsewhere, and where a machine's
inotify instances are used up, the file is looked at every 5 ms.
"""

import ctypes
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.005
_LONGEST_SLEEP_S = 1.0
"""A bound on what one lost notice could cost; a check is a few microseconds."""
_IN_MODIFY = 0x2


def wait_until(condition: Callable[[], bool], *, file: Path, timeout_s: float) -> bool:
    """Return `True` as soon as `condition` holds, which may change only when `file` is written to."""
    deadline = time.monotonic() + timeout_s
    if condition():
        return True
    while (left_s := deadline - time.monotonic()) > 0:
        with _watch(file) as notices:
            # Between the check above and the watch a write may have gone by unseen, so check again.
            if condition():
                return True
            if notices is None:
                time.sleep(min(left_s, _POLL_S))
            else:
                select.select([notices], [], [], min(left_s, _LONGEST_SLEEP_S))
        if condition():
            return True
    return False


@contextmanager
def _watch(file: Path) -> Iterator[int | None]:
    notices = _inotify(file)
    try:
        yield notices
    finally:
        if notices is not None:
            os.close(notices)


def _inotify(file: Path) -> int | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        return None
    if libc.inotify_add_watch(descriptor, os.fsencode(file), _IN_MODIFY) < 0:
        # Most often the file is not there yet: the log has had no writer.
        os.close(descriptor)
        return None
    return descriptor
