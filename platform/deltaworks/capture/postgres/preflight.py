"""What keeps a PostgreSQL database from being captured: everything at once, each with its mend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psycopg import sql

from deltaworks.capture.postgres.catalog import (
    AnyConnection,
    CatalogRow,
    Published,
    TableFacts,
    find_published,
    find_tables,
    query,
    quoted,
)
from deltaworks.capture.postgres.reading import BAG_BYTES
from deltaworks.capture.source import Finding, Severity
from deltaworks.schema import TableName, TablePattern

OLDEST_VERSION = 140000
"""pgoutput passes messages, which our marks are, from PostgreSQL 14 on."""

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a source is configured to use. `resolve` turns `patterns` into further `tables`."""

    source: str
    tables: Sequence[TableName]
    publication: str
    slot: str
    patterns: Sequence[TablePattern] = ()
    left_out: Sequence[Finding] = ()
    """Why tables that a pattern holds for are not among `tables`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is on the server, of what is wanted."""

    server: CatalogRow
    tables: Mapping[TableName, TableFacts]
    published: Mapping[TableName, Published]
    publication: CatalogRow | None
    slot: CatalogRow | None
    hidden: frozenset[int] = frozenset()
    """Oids of tables whose row-level security hides rows from our role."""
    large: frozenset[int] = frozenset()
    """Oids of tables without a key that are too large to be read whole."""

    @property
    def may_publish(self) -> bool:
        """Whether our role may publish these tables: it needs to own them."""
        return bool(self.server["is_superuser"]) or all(table.is_owner for table in self.tables.values())


def resolve(connection: AnyConnection, wanted: Wanted) -> Wanted:
    """The tables that are there now for the patterns, behind those that are named.

    One that cannot be captured is left out: somebody who makes a table must not end the capture of all others.
    """
    if not wanted.patterns:
        return wanted
    likes = [(_like(pattern.namespace), _like(pattern.name)) for pattern in wanted.patterns]
    found = query(connection, "matching", namespaces=[each for each, _ in likes], names=[each for _, each in likes])
    matching = [name for row in found if (name := TableName(row["namespace"], row["name"])) not in wanted.tables]
    trial = replace(wanted, tables=matching, patterns=())
    state = inspect(connection, trial)
    wrong = {
        name: [*_of_table(name, state, trial, connection), *_of_published(name, state, trial)] for name in matching
    }
    for name in unpublished(state, trial):
        if not (state.tables[name].is_owner or state.server["is_superuser"]):
            wrong[name].append(_unpublishable(name, wanted, connection))
    return replace(
        wanted,
        tables=(*wanted.tables, *(name for name in matching if not wrong[name])),
        patterns=(),
        left_out=tuple(_left_out(name, finding) for name in matching for finding in wrong[name]),
    )


def _like(pattern: str) -> str:
    """A pattern of ours as SQL's."""
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%")


def _unpublishable(name: TableName, wanted: Wanted, connection: AnyConnection) -> Finding:
    mend = _said(extend_publication(wanted, [name]), connection) + "; -- as the table's owner"
    return Finding(what=f"{name} is not published and is somebody else's", mend=mend)


def _left_out(name: TableName, finding: Finding) -> Finding:
    return replace(finding, what=f"{name} is left out: {finding.what}", severity=Severity.WARNING)


def inspect(connection: AnyConnection, wanted: Wanted) -> State:
    """Ask the server for all of it."""
    tables = find_tables(connection, wanted.tables)
    hidden = query(connection, "hidden", oids=[table.oid for table in tables.values()])
    keyless = [table.oid for table in tables.values() if not table.key and table.kind in ("r", "p")]
    sizes = query(connection, "sizes", oids=keyless) if keyless else []
    return State(
        server=query(connection, "server")[0],
        tables=tables,
        large=frozenset(row["oid"] for row in sizes if row["bytes"] > BAG_BYTES),
        hidden=frozenset(row["oid"] for row in hidden),
        published=find_published(connection, wanted.publication),
        publication=next(iter(query(connection, "publication", publication=wanted.publication)), None),
        slot=next(iter(query(connection, "slot", slot=wanted.slot)), None),
    )


def findings(state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    """Everything that is missing. The connection only quotes names."""
    found = [*_of_server(state, connection), *_of_slot(state, wanted, connection)]
    for name in wanted.tables:
        found += _of_table(name, state, wanted, connection)
    return found + _of_publication(state, wanted, connection)


def create_publication(wanted: Wanted, *, version: int) -> sql.Composed:
    """The statement that publishes the tables."""
    # Stored generated columns can be sent from 18 on; before, they are left out of log and dump alike.
    generated = sql.SQL(", publish_generated_columns = stored" if version >= 180000 else "")
    tables = sql.SQL(" for table {}").format(sql.SQL(", ").join(map(quoted, wanted.tables)))
    return sql.SQL("create publication {}{} with (publish_via_partition_root = true{})").format(
        sql.Identifier(wanted.publication), tables if wanted.tables else sql.SQL(""), generated
    )


def extend_publication(wanted: Wanted, missing: Sequence[TableName]) -> sql.Composed:
    """The statement that adds tables to the publication."""
    return sql.SQL("alter publication {} add table {}").format(
        sql.Identifier(wanted.publication), sql.SQL(", ").join(map(quoted, missing))
    )


def unpublished(state: State, wanted: Wanted) -> list[TableName]:
    """Tables that exist and are not in the publication."""
    return [name for name in wanted.tables if name in state.tables and name not in state.published]


def _of_server(state: State, connection: AnyConnection) -> list[Finding]:
    server = state.server
    found = []
    if server["version"] < OLDEST_VERSION:
        found.append(
            Finding(
                what=f"the server is version {server['version'] // 10000}", mend="-- move to PostgreSQL 14 or newer"
            )
        )
    if server["wal_level"] != "logical":
        found.append(
            Finding(
                what=f"wal_level is {server['wal_level']!r}, not 'logical'",
                mend="alter system set wal_level = 'logical'; -- then restart the server",
            )
        )
    if not server["may_replicate"]:
        role = sql.Identifier(server["role"])
        found.append(
            Finding(
                what=f"role {server['role']!r} may not replicate",
                mend=_said(sql.SQL("alter role {} replication").format(role), connection),
            )
        )
    is_read = state.slot is not None and state.slot["active_pid"] is not None
    if server["used_senders"] >= server["max_senders"] and not is_read:
        found.append(
            Finding(
                what=f"no WAL sender is free: all {server['max_senders']} are taken",
                mend=f"alter system set max_wal_senders = {server['max_senders'] + 4}; -- then restart the server",
            )
        )
    return found


def _of_slot(state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    slot, server = state.slot, state.server
    if slot is None:
        if server["used_slots"] < server["max_slots"]:
            return []
        return [
            Finding(
                what=f"no replication slot is free: all {server['max_slots']} are taken",
                mend=f"alter system set max_replication_slots = {server['max_slots'] + 4}; "
                "-- then restart the server, or drop a slot that nobody reads",
            )
        ]
    drop = _said(sql.SQL("select pg_drop_replication_slot({})").format(sql.Literal(wanted.slot)), connection)
    if slot["plugin"] != "pgoutput":
        return [Finding(what=f"slot {wanted.slot!r} has the plug-in {slot['plugin']!r}, not 'pgoutput'", mend=drop)]
    if slot["database"] != server["database"]:
        return [
            Finding(
                what=f"slot {wanted.slot!r} belongs to database {slot['database']!r}",
                mend=f"-- name another one in sources.{wanted.source}.slot",
            )
        ]
    return []


def _of_table(name: TableName, state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    table = state.tables.get(name)
    if table is None:
        return [Finding(what=f"table {name} does not exist", mend=f"-- take it out of sources.{wanted.source}.tables")]
    if table.kind in _KINDS:
        return [Finding(what=f"{name} is {_KINDS[table.kind]}, not a table", mend="-- capture the tables behind it")]
    found = []
    if not table.is_logged:
        found.append(
            Finding(
                what=f"table {name} is unlogged or temporary: its changes are not in the WAL",
                mend=_said(sql.SQL("alter table {} set logged").format(quoted(name)), connection),
            )
        )
    if table.identity == "n":
        found.append(
            Finding(
                what=f"table {name} has replica identity nothing: updates do not say which row",
                mend=_said(sql.SQL("alter table {} replica identity default").format(quoted(name)), connection),
            )
        )
    elif not table.key and table.identity != "f" and name not in state.published:
        full = sql.SQL("alter table {} replica identity full").format(quoted(name))
        found.append(
            Finding(
                what=f"table {name} has no primary key: once it is published, the server refuses updates and deletes",
                mend=_said(full, connection) + "; -- or add a primary key, which costs less",
            )
        )
    if table.oid in state.large:
        found.append(
            Finding(
                what=f"table {name} has no primary key, so it is dumped whole, and more than {BAG_BYTES >> 20} MB",
                mend=_said(
                    sql.SQL("alter table {} add primary key (…); -- name the columns").format(quoted(name)), connection
                ),
            )
        )
    if not table.may_select:
        role = sql.Identifier(state.server["role"])
        found.append(
            Finding(
                what=f"role {state.server['role']!r} may not read table {name}",
                mend=_said(
                    sql.SQL("grant usage on schema {} to {}; grant select on {} to {}").format(
                        sql.Identifier(name.namespace), role, quoted(name), role
                    ),
                    connection,
                ),
            )
        )
    if table.oid in state.hidden:
        bypass = sql.SQL("alter role {} bypassrls").format(sql.Identifier(state.server["role"]))
        found.append(
            Finding(
                what=f"row-level security of {name} hides rows from role {state.server['role']!r}: a dump would miss "
                "what the log brings",
                mend=_said(bypass, connection),
            )
        )
    return found


def _of_publication(state: State, wanted: Wanted, connection: AnyConnection) -> list[Finding]:
    if state.publication is None:
        may = (state.server["may_create"] or state.server["is_superuser"]) and state.may_publish
        create = create_publication(wanted, version=state.server["version"])
        what = f"publication {wanted.publication!r} does not exist and role {state.server['role']!r} may not create it"
        return [] if may else [Finding(what=what, mend=_said(create, connection) + "; -- as the tables' owner")]
    found = []
    if not state.publication["sends_all"]:
        everything = sql.SQL("alter publication {} set (publish = 'insert, update, delete, truncate')")
        found.append(
            Finding(
                what=f"publication {wanted.publication!r} leaves out some kinds of change",
                mend=_said(everything.format(sql.Identifier(wanted.publication)), connection),
            )
        )
    partitioned = [str(name) for name, table in state.tables.items() if table.kind == "p"]
    if partitioned and not state.publication["is_via_root"]:
        # Changes would come under the names of partitions, which nobody has asked for.
        through = sql.SQL("alter publication {} set (publish_via_partition_root = true)")
        found.append(
            Finding(
                what=f"publication {wanted.publication!r} sends {', '.join(partitioned)} under the partitions' names",
                mend=_said(through.format(sql.Identifier(wanted.publication)), connection),
            )
        )
    missing = unpublished(state, wanted)
    if missing and not (state.publication["is_owner"] and state.may_publish):
        names = ", ".join(map(str, missing))
        found.append(
            Finding(
                what=f"publication {wanted.publication!r} lacks {names} and role {state.server['role']!r} "
                "may not add tables to it",
                mend=_said(extend_publication(wanted, missing), connection) + "; -- as the publication's owner",
            )
        )
    for name in wanted.tables:
        found += _of_published(name, state, wanted)
    return found


def _of_published(name: TableName, state: State, wanted: Wanted) -> list[Finding]:
    published, table = state.published.get(name), state.tables.get(name)
    if published is None or table is None:
        return []
    found = []
    if published.is_filtered:
        found.append(
            Finding(
                what=f"publication {wanted.publication!r} filters the rows of {name}: a dump would read others too",
                mend=f"-- publish {name} without WHERE; filter in an app instead",
            )
        )
    lacking = [column for column in table.key if published.columns is not None and column not in published.columns]
    if lacking:
        found.append(
            Finding(
                what=f"publication {wanted.publication!r} leaves out key columns of {name}: {', '.join(lacking)}",
                mend=f"-- publish {name} with its key",
            )
        )
    return found


def _said(statement: sql.Composable, connection: AnyConnection) -> str:
    return statement.as_string(connection)
