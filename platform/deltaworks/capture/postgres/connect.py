"""Connections to the server, and its errors in the words of the source contract."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo, errors
from pydantic import SecretStr

from deltaworks.capture.postgres.refusal import TRANSIENT, sqlstate_of
from deltaworks.capture.postgres.transport import protection
from deltaworks.capture.postgres.types import SESSION_OPTIONS
from deltaworks.capture.source import DumpBlockedError, SourceNotReadyError, SourceUnreachableError
from deltaworks.errors import TerminalError

CONNECT_TIMEOUT_S = 10
LOCK_TIMEOUT_S = 5
"""How long a read waits for a table that somebody holds exclusively; meanwhile the stream stands still."""

_TLS_WORDS = ("certificate", "SSL", "TLS")
"""What libpq says in its own words, which are never translated, when the encryption cannot be had."""

_BAD_SETTING = re.compile(r"invalid (\w+ value|connection option|port number|integer value)")
"""What it says of a connection string with a setting that means nothing."""


class TableBusyError(DumpBlockedError):
    """A table is locked by somebody for longer than a read waits."""


def connect(
    dsn: SecretStr,
    *,
    name: str,
    application: str,
    replication: bool = False,
    timeout_s: float | None = None,
) -> psycopg.Connection[Any]:
    """A connection in autocommit mode whose values print as `types` reads them; encrypted as `transport` says.

    `timeout_s` is how long to wait for an answer, whatever the connection string says.

    Raises:
        SourceUnreachableError: nobody answers there now.
        SourceNotReadyError: the server refuses: wrong credentials, no such database, no right; or it
            cannot show who it is.
    """
    parts = parse(dsn, name=name)
    asked = " ".join(part for part in (str(parts.get("options") or ""), SESSION_OPTIONS) if part)
    if not replication:
        asked += f" -c lock_timeout={LOCK_TIMEOUT_S * 1000} -c synchronous_commit=local"
    wanted: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        # A server that vanished without a word is noticed within a minute.
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 4,
        "application_name": application,
        **protection(parts),
        **parts,
        "options": asked,
    }
    if replication:
        wanted["replication"] = "database"
    if timeout_s is not None:
        # In whole seconds, and below two the driver takes two.
        wanted["connect_timeout"] = max(2, round(timeout_s))
    try:
        return psycopg.connect(autocommit=True, **wanted)
    except psycopg.OperationalError as error:
        raise _refused(error, wanted, name, patience_s=timeout_s or CONNECT_TIMEOUT_S) from error


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn the driver's errors into those of the contract; `what` could not be done.

    Raises:
        SourceUnreachableError: the connection broke, or the server shuts down.
        SourceNotReadyError: a right or a thing is missing.
        TableBusyError: a table is locked.
    """
    try:
        yield
    except errors.LockNotAvailable as error:
        raise TableBusyError(f"cannot {what}: {_said(error)}; somebody holds the table, e.g. a migration") from error
    except errors.InsufficientPrivilege as error:
        raise SourceNotReadyError(f"cannot {what}: {_said(error)}; grant it, then start again") from error
    except (errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise SourceNotReadyError(f"cannot {what}: {_said(error)}; was it dropped or renamed?") from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise SourceUnreachableError(f"cannot {what}: {_said(error)}") from error
    except psycopg.Error as error:
        raise TerminalError(f"cannot {what}: {_said(error)}") from error


def parse(dsn: SecretStr, *, name: str) -> dict[str, Any]:  # Any: the driver's own values
    """The parts of a connection string.

    Raises:
        SourceNotReadyError: it is none.
    """
    try:
        return dict(conninfo.conninfo_to_dict(dsn.get_secret_value()))
    except psycopg.ProgrammingError:
        # The driver's message repeats the text, which may hold a password.
        raise SourceNotReadyError(
            f"cannot read the connection string of source {name!r}; "
            "expected e.g. postgresql://user:password@host:5432/database in sources.*.dsn"
        ) from None


def _refused(
    error: psycopg.OperationalError,
    wanted: dict[str, Any],  # Any: the driver's own values
    name: str,
    *,
    patience_s: float,
) -> SourceUnreachableError | SourceNotReadyError:
    """The error for a connection that was not made, by the server's code and not by its words."""
    said, host = _without_password(_said(error), wanted), wanted.get("host") or wanted.get("hostaddr") or ""
    if isinstance(error, errors.ConnectionTimeout):
        return SourceUnreachableError(f"cannot reach the database of source {name!r}: {said}; is it running?")
    if any(word in said for word in _TLS_WORDS):
        return SourceNotReadyError(
            f"cannot connect source {name!r} to {host!r} with sslmode {wanted.get('sslmode', 'prefer')!r}: {said}; "
            f"in sources.{name}.dsn name the authority with sslrootcert=FILE, or, where the network is yours, say "
            "sslmode=require (encrypted, not verified) or sslmode=disable"
        )
    needs_password = error.pgconn is not None and error.pgconn.needs_password
    code = None if needs_password else sqlstate_of(conninfo.make_conninfo(**wanted), patience_s=patience_s)
    is_refused = code is not None and not code.startswith(TRANSIENT)
    if needs_password or is_refused or _BAD_SETTING.search(said):
        return SourceNotReadyError(
            f"cannot connect source {name!r} as user {wanted.get('user', '')!r} to database "
            f"{wanted.get('dbname', '')!r}: {said}; mend sources.{name}.dsn"
        )
    return SourceUnreachableError(f"cannot reach the database of source {name!r}: {said}; is it running?")


def _without_password(said: str, wanted: dict[str, Any]) -> str:  # Any: the driver's own values
    for secret in (wanted.get("password"), wanted.get("sslpassword")):
        said = said.replace(str(secret), "********") if secret else said
    return said


def _said(error: psycopg.Error) -> str:
    # The primary line has names only; DETAIL lines can hold row data and are left out.
    text = error.diag.message_primary or str(error)
    return " ".join(text.split())
