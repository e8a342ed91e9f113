"""Brings the tables of one log forward, a slice of changes at a time; `load` and `verify` share it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

import duckdb
import pyarrow as pa

from deltaworks.change import MESSAGES, ChangeBatch
from deltaworks.log.change_log import StoredGroup
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName, TableSchema
from deltaworks.store.apply import Applied, apply
from deltaworks.store.bag import apply_bag, rows_of
from deltaworks.store.evolve import evolve
from deltaworks.store.texts import spread, text_columns, texts_needed

SLICE_CHANGES = 500_000
"""Changes applied at a time: about 100 MB of 20-column rows, and few enough statements."""


def slices(groups: Iterable[StoredGroup]) -> Iterator[list[StoredGroup]]:
    """Whole groups, at least `SLICE_CHANGES` together but for the last slice."""
    held: list[StoredGroup] = []
    held_changes = 0
    for group in groups:
        held.append(group)
        held_changes += group.header.next_offset - group.header.offset
        if held_changes >= SLICE_CHANGES:
            yield held
            held, held_changes = [], 0
    if held:
        yield held


class Tables:
    """The tables of one schema, inside one transaction; created and altered as their changes need it."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        *,
        schema: str,
        database: str = "lake",
        applied_up_to: Lsn = START,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._database = database
        self._applied_up_to = applied_up_to.value
        self._shapes: dict[TableName, tuple[TableSchema, str]] = {}
        self._texts: dict[TableName, frozenset[str]] = {}

    def apply(self, batches: Iterable[ChangeBatch]) -> dict[str, Applied]:
        """Apply whole transactions in order, each table by itself: tables share no rows. By short name."""
        by_table: defaultdict[TableName, list[ChangeBatch]] = defaultdict(list)
        for batch in batches:
            # Messages are for readers of the log; they are no table.
            if batch.schema.name != MESSAGES:
                by_table[batch.schema.name].append(batch)
        done = {name.short: self._apply_table(changes) for name, changes in by_table.items()}
        newest = (batch.rows["_commit"].to_numpy().max() for changes in by_table.values() for batch in changes)
        self._applied_up_to = max(self._applied_up_to, *(int(commit) for commit in newest), 0)
        return done

    def _apply_table(self, batches: list[ChangeBatch]) -> Applied:
        total = Applied()
        # A window has one shape: changes from before and after an ALTER TABLE are applied apart.
        for schema, run in groupby(batches, key=lambda batch: batch.schema):
            target = self._evolved(schema)
            rows = pa.Table.from_batches([batch.rows for batch in run])
            if not schema.key:
                total += self._apply_to_bag(schema, target, rows)
                continue
            wide, changes = spread(schema, rows, present=self._texts[schema.name])
            if len(wide.columns) - len(schema.columns) > len(self._texts[schema.name]):
                self._evolved(wide)
            total += apply(
                self._connection, target=target, schema=wide, changes=changes, applied_up_to=self._applied_up_to
            )
        return total

    def _apply_to_bag(self, schema: TableSchema, target: str, changes: pa.Table) -> Applied:
        is_emptied, came, went = rows_of(schema, changes)
        if is_emptied:
            self._connection.execute(f"delete from {target}")
        # Both with the same text columns, those that only one of them needs included.
        present = self._texts[schema.name] | texts_needed(schema, came) | texts_needed(schema, went)
        (wide, came), (_, went) = (spread(schema, rows, present=present) for rows in (came, went))
        if present != self._texts[schema.name]:
            self._evolved(wide)
        applied = apply_bag(self._connection, target=target, schema=wide, came=came, went=went)
        return Applied(changes=changes.num_rows, upserted=applied.upserted, deleted=applied.deleted)

    def _evolved(self, schema: TableSchema) -> str:
        """The quoted table, brought to this shape unless it has it since the last call."""
        known, target = self._shapes.get(schema.name, (None, ""))
        if known != schema:
            target = evolve(self._connection, database=self._database, schema=self._schema, table=schema)
            self._shapes[schema.name] = (schema, target)
            self._texts[schema.name] = text_columns(self._connection, target, schema)
        return target
