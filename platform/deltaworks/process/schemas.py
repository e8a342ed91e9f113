"""Whether the tables in the log are as an app declares them, looked at before any of their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import StoredGroup
from deltaworks.process.app import App
from deltaworks.process.source import Table
from deltaworks.schema import TableName, TableSchema


class Schemas:
    """The shapes that one app has met; `latest` are the newest in the log as of its start."""

    def __init__(self, app: App, *, latest: Mapping[TableName, TableSchema]) -> None:
        self._app = app
        self._latest = latest
        self._known: dict[TableName, TableSchema] = {}

    def tables_of(self, batch: ChangeBatch) -> list[Table[Any]]:  # Any: rows of each table's own schema
        """What the app declares of the batch's table; a table may stand in an app twice."""
        return [table for table in self._app.tables if table.name == batch.schema.name]

    def check(self, groups: Sequence[StoredGroup]) -> None:
        """Refuse a table that came in a shape the app cannot read, before any row of it is folded.

        Raises:
            SchemaMismatchError: it lacks a column that the app reads, or has another type there.
        """
        for group in groups:
            for batch in group.batches:
                if self.tables_of(batch) and self._known.get(batch.schema.name) != batch.schema:
                    self._app.check([self._completed(batch.schema)], is_complete=False)
                    self._known[batch.schema.name] = batch.schema

    def _completed(self, schema: TableSchema) -> TableSchema:
        """A schema of the past with the nullable columns that the table has been given since."""
        latest = self._latest.get(schema.name, schema)
        added = tuple(column for column in latest.columns if column.nullable and column.name not in schema.names)
        return TableSchema(name=schema.name, columns=(*schema.columns, *added), key=schema.key)
