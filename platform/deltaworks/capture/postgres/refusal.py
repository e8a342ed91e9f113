"""Why a server refused a login, by its SQLSTATE.

The words of a refusal are in the server's language (`lc_messages`), and libpq gives nothing but words: the code
is in them only under the verbosity `verbose`, which psycopg has no function for. So after a login failed, it is
made once more through libpq itself, with that verbosity.
"""

import ctypes
import re
import select
import time
from functools import cache
from pathlib import Path

import psycopg
from psycopg import pq

_VERBOSE = 2
# The word before the code is translated, the code is not: `FATAL:  28P01: …`.
_CODE = re.compile(r":\s+(XX\d{3}|\d[0-9A-Z]{4}): ")
_WRITING = (pq.PollingStatus.WRITING,)

TRANSIENT = ("53", "57", "58", "XX")
"""Classes of refusals that may pass by themselves: too many connections, starting up, shutting down."""


def sqlstate_of(conninfo: str, *, patience_s: float = 5.0) -> str | None:
    """The code with which the server refuses this login now; `None` when it does not, or never answers."""
    verbosity = _set_verbosity()
    if verbosity is None:
        return None
    try:
        connection = pq.PGconn.connect_start(conninfo.encode())
    except psycopg.Error:
        return None
    try:
        # psycopg's types leave the pointer out, although it is there for just this.
        verbosity(connection.pgconn_ptr, _VERBOSE)  # type: ignore[attr-defined]
        if not _is_refused(connection, deadline=time.monotonic() + patience_s):
            return None
        found = _CODE.search(connection.get_error_message())
        return found[1] if found else None
    finally:
        connection.finish()


def _is_refused(connection: pq.abc.PGconn, *, deadline: float) -> bool:
    while (left_s := deadline - time.monotonic()) > 0:
        status = connection.connect_poll()
        if status in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            return status == pq.PollingStatus.FAILED
        poll = select.poll()
        poll.register(connection.socket, select.POLLOUT if status in _WRITING else select.POLLIN)
        poll.poll(left_s * 1000)
    return False


@cache
def _set_verbosity() -> "ctypes._FuncPointer | None":
    """`PQsetErrorVerbosity` of the libpq that psycopg has loaded, wherever its wheel keeps it."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    path = re.search(r"/\S*libpq[-.]\S*", mapped)
    if path is None:
        return None
    function = ctypes.CDLL(path[0]).PQsetErrorVerbosity
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int
    return function
