"""A source whose changes are Python values: what an app reads, without a database.

    films = ListSource(movie_app)
    films.commit(insert("movie", movie_id=1, title="Alien", status="released"))
    films.commit(update("movie", movie_id=1, status="withdrawn"))       the other columns stay as they are
    films.reader()                                                      a log, for a runner

It takes the tables and their columns from the app, keeps the rows, and writes whole rows into a log in memory as
capture would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from deltaworks.change import CREATE, DELETE, READ, UPDATE
from deltaworks.errors import TerminalError
from deltaworks.log.memory import MemoryLog, MemoryLogReader
from deltaworks.process.app import App
from deltaworks.process.shape import arrow_type
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.testing.changes import Change, Feed

_ROW_NUMBER = "_row"
"""The key of a related table whose own key the test does not say: every row is another one."""


class ListSourceError(TerminalError):
    """A test gives changes that no source could have: the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class RowChange:
    """A change of one row; make it with `insert`, `update`, `delete` or `dumped`."""

    op: Literal["c", "u", "d", "r"]
    table: str
    values: Mapping[str, Any]


def insert(table: str, **row: Any) -> RowChange:
    """A row that came; columns that may be null may be left out."""
    return RowChange(CREATE, table, row)  # type: ignore[arg-type]  # the constant is one of them


def update(table: str, **columns: Any) -> RowChange:
    """The row of this key with other values in these columns."""
    return RowChange(UPDATE, table, columns)  # type: ignore[arg-type]  # the constant is one of them


def delete(table: str, **key: Any) -> RowChange:
    """The row of this key went."""
    return RowChange(DELETE, table, key)  # type: ignore[arg-type]  # the constant is one of them


def dumped(table: str, **row: Any) -> RowChange:
    """A row that a dump found: it makes its document, but is no change to `on_change`."""
    return RowChange(READ, table, row)  # type: ignore[arg-type]  # the constant is one of them


class ListSource:
    """The tables of one app, and every change of them in a log in memory."""

    def __init__(self, app: App, *, keys: Mapping[str, str | Sequence[str]] | None = None) -> None:
        """`keys` says the own key of related tables, which apps do not declare: needed to update or delete there."""
        self._tables = _tables(app, keys or {})
        self._rows: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {name: {} for name in self._tables}
        self._log = MemoryLog()
        self._feed = Feed(self._log.writer())
        self._count = 0

    def commit(self, *changes: RowChange) -> int:
        """Make these changes one transaction; returns its position.

        Raises:
            ListSourceError: no such table or column, no such row, or a row too many.
        """
        return self._feed.commit(*map(self._change, changes))

    def reader(self) -> MemoryLogReader:
        """The log of all that was committed; grows with each commit."""
        return self._log.reader()

    def _change(self, change: RowChange) -> Change:
        if change.table not in self._tables:
            raise ListSourceError(f"the app reads no table {change.table!r}; it reads {', '.join(self._tables)}")
        table, rows = self._tables[change.table], self._rows[change.table]
        values = dict(change.values)
        if table.key == (_ROW_NUMBER,):
            if change.op in (UPDATE, DELETE):
                raise ListSourceError(
                    f"which row of {change.table!r}? Say its key: keys={{{change.table!r}: 'the_column'}}"
                )
            self._count += 1
            values[_ROW_NUMBER] = self._count
        for name in values:
            if name not in table.names:
                raise ListSourceError(
                    f"the app reads no column {name!r} of {change.table!r}; it reads {', '.join(table.names)}"
                )
        missing = [name for name in table.key if name not in values]
        if missing:
            raise ListSourceError(f"a change of {change.table!r} has to say {', '.join(missing)}: it is the key")
        key = tuple(values[name] for name in table.key)
        if change.op in (UPDATE, DELETE) and key not in rows:
            raise ListSourceError(f"no row {key!r} of {change.table!r} is there; insert it before")
        if change.op == CREATE and key in rows:
            raise ListSourceError(f"the row {key!r} of {change.table!r} is there already; update it")
        if change.op == DELETE:
            del rows[key]
            return Change(op=DELETE, table=table, row=dict(zip(table.key, key, strict=True)))
        row = rows.get(key, {}) | values
        for column in table.columns:
            if not column.nullable and row.get(column.name) is None:
                raise ListSourceError(f"a row of {change.table!r} needs {column.name!r}: the app declares it not null")
        rows[key] = row
        return Change(op=change.op, table=table, row=row)


def _tables(app: App, keys: Mapping[str, str | Sequence[str]]) -> dict[str, TableSchema]:
    """Each table that the app reads, with the columns that it declares, by its short name."""
    columns: dict[TableName, dict[str, Column]] = {}
    primary: dict[TableName, tuple[str, ...]] = {}
    for table in app.tables:
        own = keys.get(table.name.short)
        groups_by = table.key or app.key
        is_keyed_by = table is app.entity or table in app.lookups
        listed = (groups_by,) if is_keyed_by else ((own,) if isinstance(own, str) else tuple(own or (_ROW_NUMBER,)))
        primary.setdefault(table.name, listed)
        found = columns.setdefault(table.name, {})
        for item in table.fields:
            kind = arrow_type(item.type, where=f"{table}.{item.name}")
            found[item.name] = Column(name=item.name, type=kind, source_type=str(kind), nullable=item.nullable)
        for name in (*primary[table.name], groups_by):
            kind = pa.int64() if name == _ROW_NUMBER else _key_type(app, name)
            found.setdefault(name, Column(name=name, type=kind, source_type=str(kind), nullable=False))
    unknown = set(keys) - {name.short for name in columns}
    if unknown:
        raise ListSourceError(f"keys= names {', '.join(sorted(unknown))}, which the app does not read")
    return {
        name.short: TableSchema(name=name, columns=tuple(found.values()), key=primary[name])
        for name, found in columns.items()
    }


def _key_type(app: App, name: str) -> pa.DataType:
    """The type of a key that a table does not declare: as another one declares it, else a number."""
    for table in app.tables:
        for item in table.fields:
            if item.name == name:
                return arrow_type(item.type, where=f"{table}.{name}")
    return pa.int64()
