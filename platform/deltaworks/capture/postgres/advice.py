"""What does not keep a database from being captured and is worth a warning: what may go wrong, what is left out."""

from collections.abc import Sequence

from psycopg import sql
from pydantic import SecretStr

from deltaworks.capture.postgres.catalog import AnyConnection, CatalogRow, query, quoted
from deltaworks.capture.postgres.connect import connect
from deltaworks.capture.postgres.preflight import State, Wanted
from deltaworks.capture.postgres.transport import is_local
from deltaworks.capture.source import Finding, Severity, SourceNotReadyError, SourceUnreachableError
from deltaworks.schema import TableName

SHORTEST_SENDER_TIMEOUT_MS = 15_000
"""A reader tells the server every 5 s that it lives, so below this a short pause ends the stream."""

USUAL_DECODING_KB = 65_536
"""The server's default; with less, transactions are written to the server's disk sooner than they need to be."""

_RELOAD = "select pg_reload_conf();"


def warnings(state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    """Everything worth a warning, of the server, the connection, the role and the tables."""
    settings = query(connection, "settings")[0]
    return [
        *_of_settings(settings, wanted),
        *_of_connection(connection, wanted),
        *_of_role(state, wanted),
        *_of_columns(state, wanted, connection),
        *_of_keyless(state, connection),
        *wanted.left_out,
    ]


def refused_stream(dsn: SecretStr, *, name: str) -> list[Finding]:
    """A finding when the server takes ordinary connections and refuses one for replication."""
    try:
        connect(dsn, name=name, application=f"deltaworks {name} check", replication=True).close()
    except (SourceNotReadyError, SourceUnreachableError) as error:
        return [
            Finding(
                what=f"a connection for replication is refused: {error}",
                mend="-- let the role in with a line of pg_hba.conf for this database, and connect to the server"
                " itself, not to a pooler",
            )
        ]
    return []


def _of_settings(settings: CatalogRow, wanted: Wanted) -> list[Finding]:
    found = []
    if settings["kept_mb"] == -1:
        found.append(
            _warning(
                f"max_slot_wal_keep_size is unlimited: while nobody reads slot {wanted.slot!r}, its WAL can fill the"
                " server's disk",
                f"alter system set max_slot_wal_keep_size = '50GB'; {_RELOAD} -- as much as the disk can spare",
            )
        )
    timeout_ms = settings["sender_timeout_ms"]
    if timeout_ms == 0:
        found.append(
            _warning(
                "wal_sender_timeout is off: a reader that vanished holds the slot until the network tells the server",
                f"alter system set wal_sender_timeout = '60s'; {_RELOAD}",
            )
        )
    elif timeout_ms < SHORTEST_SENDER_TIMEOUT_MS:
        found.append(
            _warning(
                f"wal_sender_timeout is {timeout_ms} ms: a short pause of the reader ends the stream",
                f"alter system set wal_sender_timeout = '60s'; {_RELOAD}",
            )
        )
    if settings["idle_timeout_s"]:
        found.append(
            _warning(
                f"idle_replication_slot_timeout is {settings['idle_timeout_s']} s: when capture rests for longer, the"
                " server gives its slot up, and changes are missed",
                f"alter system set idle_replication_slot_timeout = 0; {_RELOAD} -- max_slot_wal_keep_size is the limit",
            )
        )
    if settings["decoding_kb"] < USUAL_DECODING_KB:
        found.append(
            _warning(
                f"logical_decoding_work_mem is {settings['decoding_kb']} kB: middling transactions are spilled to the"
                " server's disk",
                f"alter system set logical_decoding_work_mem = '64MB'; {_RELOAD}",
            )
        )
    return found


def _of_connection(connection: AnyConnection, wanted: Wanted) -> list[Finding]:
    if is_local(connection.info.host):
        return []
    asked = {option.keyword: option.val for option in connection.pgconn.info}
    mode = (asked[b"sslmode"] or b"").decode()
    if not connection.pgconn.ssl_in_use:
        what = f"the connection to {connection.info.host!r} is not encrypted (sslmode {mode!r})"
    elif not mode.startswith("verify"):
        what = (
            f"the connection to {connection.info.host!r} is encrypted, and nobody checks with whom (sslmode {mode!r})"
        )
    else:
        return []
    mend = f"-- take sslmode out of sources.{wanted.source}.dsn, and name the authority with sslrootcert=FILE"
    return [_warning(what, mend)]


def _of_role(state: State, wanted: Wanted) -> list[Finding]:
    if not state.server["is_superuser"]:
        return []
    return [
        _warning(
            f"role {state.server['role']!r} is a superuser: capture needs far less",
            f"-- `deltaworks check {wanted.source} --sql` prints a role that can do all of it and nothing more",
        )
    ]


def _of_columns(state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    """Generated columns that the log does not bring."""
    by_oid = {table.oid: table.name for table in state.tables.values()}
    found = []
    for row in query(connection, "generated", oids=list(by_oid)):
        name = by_oid[row["oid"]]
        missing = _unsent(row["columns"], name, state)
        if missing:
            found.append(
                _warning(
                    f"generated columns of {name} are left out: {', '.join(missing)}", _generated_mend(state, wanted)
                )
            )
    return found


def _unsent(columns: Sequence[str], name: TableName, state: State) -> list[str]:
    published = state.published.get(name)
    if state.server["version"] < 180000:
        # Before 18 no publication sends them, although the catalog lists them as published.
        return list(columns)
    if published is None or published.columns is None:
        return []
    return [column for column in columns if column not in published.columns]


def _of_keyless(state: State, connection: AnyConnection) -> list[Finding]:
    return [
        _warning(
            f"table {name} has no key and the default replica identity: while it is published, the server refuses to"
            " update or delete its rows",
            sql.SQL("alter table {} replica identity full;").format(quoted(name)).as_string(connection),
        )
        for name, table in state.tables.items()
        if not table.key and table.identity == "d" and name in state.published
    ]


def _generated_mend(state: State, wanted: Wanted) -> str:
    if state.server["version"] < 180000:
        return "-- compute them from the columns that are sent; PostgreSQL 18 sends stored ones"
    publication = sql.Identifier(wanted.publication).as_string(None)
    return f"alter publication {publication} set (publish_generated_columns = stored); -- virtual ones are never sent"


def _warning(what: str, mend: str) -> Finding:
    return Finding(what=what, mend=mend, severity=Severity.WARNING)
