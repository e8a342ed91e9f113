"""The rows of an app's tables in its state: the declared columns of each, by its key, beside its entity."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaworks.process.app import App
from deltaworks.process.fold import Key, Row
from deltaworks.process.shape import Decode, decoder, records
from deltaworks.process.source import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    table: Table[Any]
    decoders: Sequence[Decode | None]

    @classmethod
    def of(cls, table: Table[Any]) -> "_Reader":
        return cls(table=table, decoders=[decoder(item.type) for item in table.fields])

    def read(self, columns: Iterable[Sequence[Any]]) -> Iterable[Any]:
        """The rows out of their stored columns, as the app declares them."""
        # Column by column: rows are read for every entity, and most columns are as they are stored.
        values = [
            column if decode is None else [None if value is None else decode(value) for value in column]
            for decode, column in zip(self.decoders, columns, strict=True)
        ]
        return zip(*values, strict=True) if self.table.schema is None else records(self.table.schema, values)


class Rows:
    """The row tables of a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection, app: App) -> None:
        self._connection = connection
        self._readers = {table.name.short: _Reader.of(table) for table in (app.entity, *app.related)}
        self._put = {name: _put_statement(reader.table) for name, reader in self._readers.items()}

    def statements(self) -> Iterator[str]:
        """What creates the tables."""
        for reader in self._readers.values():
            index = quoted(f"row_{reader.table.name.short}_by_entity")
            columns = "".join(f", {quoted(item.name)}" for item in reader.table.fields)
            # Columns without a type keep what they are given, so a text of digits stays a text.
            yield f"create table {_name(reader.table)} (_key primary key, _entity{columns}) without rowid"
            yield f"create index {index} on {_name(reader.table)} (_entity)"

    def name_of(self, table: Table[Any]) -> str:
        """The table's name as SQLite takes it."""
        return _name(table)

    def stored(self, table: Table[Any], keys: Iterable[Key]) -> dict[Key, Row]:
        """The rows of these keys, those that are there."""
        rows = self._connection.execute(
            f"select r.* from json_each(?) k cross join {_name(table)} r on r._key = k.value",
            (json.dumps(list(keys)),),
        )
        return {row[0]: row[1:] for row in rows}

    def has_any(self, table: Table[Any]) -> bool:
        """Whether there is a row of a table."""
        return self._connection.execute(f"select 1 from {_name(table)} limit 1").fetchone() is not None

    def entities(self, table: Table[Any]) -> list[Key]:
        """The entities that have a row in a table."""
        return [entity for (entity,) in self._connection.execute(f"select distinct _entity from {_name(table)}")]

    def clear(self, table: Table[Any]) -> None:
        """Remove every row of a table."""
        self._connection.execute(f"delete from {_name(table)}")

    def put(self, table: Table[Any], rows: Mapping[Key, Row | None]) -> None:
        """Store rows by key; `None` removes one."""
        gone = [(key,) for key, row in rows.items() if row is None]
        self._connection.executemany(f"delete from {_name(table)} where _key = ?", gone)
        there = ((key, *row) for key, row in rows.items() if row is not None)
        self._connection.executemany(self._put[table.name.short], there)

    def of_entities(self, table: Table[Any], keys: Sequence[Key]) -> dict[Key, list[Any]]:
        """The rows of these entities as the app declares them, in the order of the rows' keys."""
        found = self._connection.execute(
            f"select r.* from json_each(?) k cross join {_name(table)} r on r._entity = k.value order by r._key",
            (json.dumps(keys),),
        ).fetchall()
        grouped: dict[Key, list[Any]] = {}
        if found:
            _, entities, *columns = zip(*found, strict=True)
            for entity, row in zip(entities, self._readers[table.name.short].read(columns), strict=True):
                grouped.setdefault(entity, []).append(row)
        return grouped

    def read(self, table: Table[Any], values: Sequence[Any]) -> Any:  # Any: what the app declares rows to be
        """A row as the app declares it, from its stored values."""
        (row,) = self._readers[table.name.short].read([value] for value in values)
        return row


def quoted(name: str) -> str:
    """A name as SQLite takes it, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def _name(table: Table[Any]) -> str:
    return quoted(f"row_{table.name.short}")


def _put_statement(table: Table[Any]) -> str:
    return f"insert or replace into {_name(table)} values ({', '.join('?' * (len(table.fields) + 2))})"
