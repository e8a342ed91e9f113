"""One reader of a source, over all machines: an advisory lock on the source's own database.

    reader   session with the lock ──beat──beat──beat──x silent for longer than `lease_s`
    standby  tries the lock … … … … … … … … … … … … … ─► ends that session and its stream, then takes the lock

The server frees the lock when its session ends, so after kill -9 a standby has it at its next try. A reader
that stands still (stopped, swapped out, cut off) keeps its session but sends no beats; the standby has the
server end its sessions, so when it wakes up it has no connection by which it could read or confirm. All times
are the server's. Whoever holds the lease may end any stream of its source: there is none but a dead reader's.
"""

import threading
import time
import zlib
from contextlib import suppress

import psycopg
import structlog
from pydantic import SecretStr

from deltaworks.capture.continuity import LeaseHeldError, LeaseLostError
from deltaworks.capture.postgres.catalog import AnyConnection, query
from deltaworks.capture.postgres.connect import connect, translated

BEATS_PER_LEASE = 6
"""Some beats may be late before the lease is in danger."""

END_PATIENCE_S = 2.0
"""How long an ended session may take to let go of its lock."""

_CLASS = int.from_bytes(b"DELT", "big")
_SETTINGS = """
set idle_session_timeout = 0; set tcp_keepalives_idle = 5; set tcp_keepalives_interval = 2; set tcp_keepalives_count = 3
"""

logger = structlog.get_logger()


class PostgresLease:
    """A `SourceLease`. Its beats are sent by a thread of its own, so a long step of the reader does not lose it."""

    def __init__(self, dsn: SecretStr, *, name: str, slot: str, lease_s: float) -> None:
        self._dsn = dsn
        self._name = name
        self._slot = slot
        self._lease_s = lease_s
        self._key = (_CLASS, _signed(zlib.crc32(slot.encode())))
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._connection: AnyConnection | None = None
        self._is_held = False
        self._thread = threading.Thread(target=self._beat, name=f"lease of {name}", daemon=True)

    def take(self) -> None:
        """Take the lease, from a holder that has been silent for longer than `lease_s` too. Call it until it works.

        Raises:
            LeaseHeldError: another reader has it and is alive.
            SourceUnreachableError: the server does not answer.
        """
        with self._guard:
            self._acquire()
        self._thread.start()

    def is_held(self) -> bool:
        """Whether it is still ours, as of the last beat."""
        return self._is_held

    def check(self) -> None:
        """Ask the server; see `SourceLease`."""
        with self._guard:
            if self._is_alive():
                return
            self._drop()
            try:
                self._acquire()
            except LeaseHeldError as error:
                self._drop()
                raise LeaseLostError(f"cannot go on capturing {self._name!r}: {error}") from error

    def close(self) -> None:
        """Let another reader have it; a second call does nothing."""
        self._stopped.set()
        with self._guard:
            self._drop()

    def _acquire(self) -> None:
        if self._connection is None or not self._is_alive():
            self._drop()
            self._connection = connect(self._dsn, name=self._name, application=f"deltaworks {self._name} lease")
            with translated(f"take the lease of source {self._name!r}"):
                self._connection.execute(_SETTINGS)
        with translated(f"take the lease of source {self._name!r}"):
            self._lock(self._connection)
            self._end_stream(self._connection)
        self._is_held = True

    def _lock(self, connection: AnyConnection) -> None:
        deadline = time.monotonic() + END_PATIENCE_S
        while not _is_true(connection, "select pg_catalog.pg_try_advisory_lock(%s, %s)", [*self._key]):
            classid, objid = self._key
            holder = next(iter(query(connection, "lease_holder", classid=classid, objid=objid & 0xFFFFFFFF)), None)
            if holder is None:
                continue
            # Another role's beats are hidden; such a holder counts as alive.
            if holder["silent_s"] is None or holder["silent_s"] <= self._lease_s or time.monotonic() > deadline:
                raise LeaseHeldError(
                    f"process {holder['pid']} of the server ({holder['reader'] or 'another role'}) has the lease of"
                    f" slot {self._slot!r}"
                )
            logger.warning("a silent reader is cut off", source=self._name, silent_s=round(holder["silent_s"], 1))
            # Its stream first: without it nothing can be confirmed, whatever it still writes.
            self._end_stream(connection)
            connection.execute("select pg_catalog.pg_terminate_backend(%s)", [holder["pid"]])
            time.sleep(0.05)

    def _end_stream(self, connection: AnyConnection) -> None:
        for slot in query(connection, "slot", slot=self._slot):
            if slot["active_pid"] is not None and slot["reader"] == f"deltaworks {self._name} stream":
                logger.warning("a stream that a reader left behind is ended", source=self._name, slot=self._slot)
                connection.execute("select pg_catalog.pg_terminate_backend(%s)", [slot["active_pid"]])

    def _beat(self) -> None:
        while not self._stopped.wait(self._lease_s / BEATS_PER_LEASE):
            with self._guard:
                self._is_held = self._is_alive()

    def _is_alive(self) -> bool:
        if self._connection is None or self._connection.closed:
            return False
        try:
            self._connection.execute("select 1")
        except psycopg.Error:
            return False
        return True

    def _drop(self) -> None:
        self._is_held = False
        if self._connection is not None:
            with suppress(psycopg.Error):
                # A session that is closed keeps its locks until the server comes round to ending it.
                self._connection.execute("select pg_catalog.pg_advisory_unlock_all()")
            self._connection.close()
            self._connection = None


def _is_true(connection: AnyConnection, statement: str, values: list[int]) -> bool:
    row = connection.execute(statement.encode(), values).fetchone()
    return row is not None and bool(row[0])


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
