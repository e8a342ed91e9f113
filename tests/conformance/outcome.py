"""What came out of capture: events in the order of the log, and the tables of a sink that applied them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from values import Row, Text, row_texts

from deltaworks.change import MESSAGE, ChangeBatch
from deltaworks.log.local import LocalLogReader
from deltaworks.schema import TableName, TableSchema

Key = tuple[tuple[str, Text], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change as the log has it, in texts."""

    table: TableName
    op: str
    schema: TableSchema
    row: Row
    key: Row
    old_key: Row | None
    before: Row | None
    unchanged: frozenset[str]
    commit: int
    ordinal: int
    txid: int
    """0 for what no transaction of the source did: reads of a dump, and repairs."""
    offset: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.commit, self.ordinal


@dataclass(slots=True)
class Sink:
    """Tables that follow the events; a key's row is the last one, a table without a key is a bag of rows."""

    tables: dict[TableName, dict[Key, Row]] = field(default_factory=dict)
    bags: dict[TableName, list[Row]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    """Reads that said something else than a change that was out before them."""
    _changed: dict[tuple[TableName, Key], set[str]] = field(default_factory=dict)
    _keys: dict[TableName, tuple[str, ...]] = field(default_factory=dict)

    def rows(self, table: TableName) -> list[Row]:
        return [*self.tables.get(table, {}).values(), *self.bags.get(table, [])]

    def find(self, table: TableName, key: Sequence[str]) -> Row | None:
        """The row whose key has these texts."""
        for found, row in self.tables.get(table, {}).items():
            if [text for _name, text in found] == list(key):
                return row
        return None

    def put(self, table: TableName, row: Row, key: Sequence[str]) -> None:
        """A row that the sink has from elsewhere."""
        if key:
            self.tables.setdefault(table, {})[tuple((name, row[name]) for name in key)] = row
        else:
            self.bags.setdefault(table, []).append(row)

    def apply(self, event: Event) -> None:
        """Take the next event."""
        if event.op == MESSAGE:
            return
        if event.op == "t":
            self.tables.pop(event.table, None)
            self.bags.pop(event.table, None)
        elif not event.schema.key:
            self._apply_to_bag(event)
        else:
            self._apply_by_key(event)

    def _apply_by_key(self, event: Event) -> None:
        if self._keys.get(event.table, event.schema.key) != event.schema.key:
            self.tables[event.table] = _keyed_by(self.tables.get(event.table, {}), event.schema.key)
        self._keys[event.table] = event.schema.key
        rows = self.tables.setdefault(event.table, {})
        key = _key(event.key)
        was_at = _key(event.old_key) if event.old_key is not None else key
        before = rows.pop(was_at, {})
        known = self._changed.pop((event.table, was_at), set())
        if event.op == "d":
            return
        sent = {name: text for name, text in event.row.items() if name not in event.unchanged}
        # A column that is gone from the table says nothing of the read.
        if event.op == "r" and any(before.get(name, sent[name]) != sent[name] for name in known & sent.keys()):
            self.stale.append(f"{event.table} {dict(key)}")
        # A table may have lost a column since the row was last seen.
        rows[key] = {name: text for name, text in before.items() if name in event.unchanged} | sent
        self._changed[(event.table, key)] = known | set(sent) if event.op != "r" else known

    def _apply_to_bag(self, event: Event) -> None:
        bag = self.bags.setdefault(event.table, [])
        if event.op in ("u", "d") and event.before is not None and event.before in bag:
            bag.remove(event.before)
        if event.op != "d":
            bag.append(event.row)


def read_events(log: Path, *, after_offset: int = 0) -> list[Event]:
    """The events behind an offset of the log, in its order."""
    return [event for event in _events(log) if event.offset >= after_offset]


def in_commit_order(events: Sequence[Event]) -> list[Event]:
    """Streamed events of several tables as the source committed them; batches of a group are per table."""
    return sorted(events, key=lambda event: event.identity)


def _events(log: Path) -> Iterator[Event]:
    for group in LocalLogReader(log).read(after_sequence=-1):
        offset = group.header.offset
        for batch in group.batches:
            yield from _of_batch(batch, offset)
            offset += len(batch)


def _of_batch(batch: ChangeBatch, offset: int) -> Iterator[Event]:
    schema = batch.schema
    for place, values in enumerate(batch.rows.to_pylist()):
        old_key, before = values["_old_key"], values.get("_before")
        yield Event(
            table=schema.name,
            op=values["_op"],
            schema=schema,
            row=row_texts(schema, values),
            key=row_texts(schema, values, schema.key),
            old_key=None if old_key is None else row_texts(schema, old_key, schema.key),
            before=None if before is None else row_texts(schema, before),
            unchanged=frozenset(values["_unchanged"] or ()),
            commit=values["_commit"],
            ordinal=values["_ordinal"],
            txid=values["_txid"],
            offset=offset + place,
        )


def _keyed_by(rows: dict[Key, Row], names: Sequence[str]) -> dict[Key, Row]:
    """The rows under the key that the table has now; one without its columns is of an older table and waits
    there for its delete.
    """
    return {
        tuple((name, row[name]) for name in names) if row.keys() >= set(names) else key: row
        for key, row in rows.items()
    }


def _key(row: Row) -> Key:
    return tuple(row.items())
