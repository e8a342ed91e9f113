"""What is said where the disk of an app's state has no room: SQLite has several words for it, and files have others."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaworks.errors import RetryableError
from deltaworks.log.full_disk import is_full

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class StateFullError(RetryableError):
    """The disk of an app's state is full; nothing of the transaction is there, and the same one works later."""


def is_for_want_of_room(error: BaseException, folder: Path) -> bool:
    """Whether something below this folder failed because its disk is full."""
    if not isinstance(error, sqlite3.OperationalError):
        return isinstance(error, OSError) and error.errno in _NO_ROOM
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # A file that cannot be made, or made longer for readers to map, is an error of input and output or of opening.
    return code == sqlite3.SQLITE_FULL or (code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and is_full(folder))


@contextmanager
def opening(what: str, file: Path) -> Iterator[None]:
    """Name the error of a file of a state that cannot be made or opened for want of room.

    Raises:
        StateFullError: that; what is there already is as it was.
    """
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if not is_for_want_of_room(error, file.parent):
            raise
        raise StateFullError(
            f"cannot open {what}, {str(file)!r}: no space left on its disk; free space below home, then it is opened "
            "as it was, nothing was lost"
        ) from error
