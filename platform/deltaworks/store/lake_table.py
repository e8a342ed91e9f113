"""The sink into the lake: documents become changes in the app's own log, and `load` brings them in.

    documents ──► write ──► flush: one group in log/<app> ──► load ──► lake.<app>.<table>

Several tables of one app share its log, and a flush of any of them brings what waits in all of them into one group:
a load has what came of a change in every table or in none.

So a document is in the lake the same way as a row of a source: one durable log, one loader, one commit
with the position in it. The log may hold an older version of a document behind a newer one (a key
that waited, a document written again after a crash); the loader's rule "per key the largest identity wins" is
what keeps the table from going back. Documents that one change touched share its identity; it
is unique per key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from deltaworks.capture.proof import Proof
from deltaworks.change import DELETE, UPDATE, ChangeBatch, change_schema
from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.change_log import Group, LogWriter
from deltaworks.log.registry import open_writer
from deltaworks.position import Lsn
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.shape import arrow_type, fields_of
from deltaworks.process.sink import Capabilities, Document, Refusal, Sink, SinkReader
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.store.lake_columns import change_rows, newest_in_order


class DocumentShapeError(TerminalError):
    """A document does not have the shape that its lake table was declared with."""


class SameTableError(TerminalError):
    """Two sinks of an app would write the same table of the lake."""


@dataclass(frozen=True, slots=True)
class LakeTable:
    """A table of the lake as an app declares it; a `SinkSpec`.

    `schema` is the documents' `TypedDict` or dataclass, or a mapping from column to Python or Arrow type.
    The key column must be in it. Lists and nested types become lists and structs. An app may have several.

    >>> LakeTable("film", schema={"film_id": int, "genres": list[str]}).table_schema("film_id").column("genres").type
    ListType(list<item: string>)
    """

    name: str
    schema: type | Mapping[str, Any] = field(kw_only=True)  # Any: a column may be a type or a pyarrow DataType

    @property
    def capabilities(self) -> Capabilities:
        """The loader keeps versions and brings a flush in with one commit."""
        return Capabilities(
            is_versioned=True,
            keeps_tombstones=True,
            is_transactional=True,
            is_columnar=True,
            can_read_back=True,
            is_in_home=True,
        )

    def table_schema(self, key: str) -> TableSchema:
        """The table's columns, as the loader will create them.

        Raises:
            DocumentShapeError: the key is not a column.
        """
        types = self.schema if isinstance(self.schema, Mapping) else _declared(self.schema)
        if key not in types:
            raise DocumentShapeError(
                f"cannot make lake table {self.name!r}: the app's key {key!r} is not a column; "
                f"its columns are {', '.join(types)}"
            )
        columns = tuple(
            Column(name=name, type=kind, source_type=str(kind), nullable=name != key)
            for name, declared in types.items()
            for kind in [arrow_type(declared, where=f"{self.name}.{name}")]
        )
        return TableSchema(name=TableName.parse(self.name), columns=columns, key=(key,))

    def open(self, *, app: str, key: str, config: Config) -> "LakeTableWriter":
        """Take the app's log.

        Raises:
            FencedError: another writer holds it.
            DocumentShapeError: the key is not a column.
        """
        schema = self.table_schema(key)
        return LakeTableWriter(schema, AppLog(open_writer(config, app)))

    def open_beside(self, first: Sink, *, key: str) -> "LakeTableWriter":
        """Join the app's first lake table in its log; see `BesideSpec`.

        Raises:
            SameTableError: another sink of the app writes the same table of the lake.
            DocumentShapeError: the key is not a column.
        """
        assert isinstance(first, LakeTableWriter)  # noqa: S101 - the contract of `BesideSpec`
        return LakeTableWriter(self.table_schema(key), first.log)

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:
        """Read back what the lake holds, and what the app's log holds beyond it."""
        # The lake is opened only where it is read.
        from deltaworks.store.lake_read_back import LakeBackReader  # noqa: PLC0415

        return LakeBackReader(self.table_schema(key), app=app, config=config)


class AppLog:
    """The log of one app and the lake tables that share it; closed with the last of them. Serves one thread."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._tables: list[LakeTableWriter] = []

    def join(self, table: "LakeTableWriter") -> None:
        """Take a table in.

        Raises:
            SameTableError: it is there already.
        """
        if table.name in [other.name for other in self._tables]:
            raise SameTableError(
                f"cannot write lake table {table.name!r}: two sinks of the app are that table of the lake; "
                "all its tables are in one schema; rename one"
            )
        self._tables.append(table)

    def leave(self, table: "LakeTableWriter") -> None:
        """Let a table go; a second call does nothing."""
        if table in self._tables:
            self._tables.remove(table)
            if not self._tables:
                self._log.close()

    def flush(self, *, up_to: Lsn) -> None:
        """Append what waits in every table as one group, durable when this returns.

        Raises:
            LogFullError: no space; the next flush tries the same documents again.
        """
        end = self._log.end()
        # An app that starts over reads the log from its start, but what is in its own log stays true.
        position = max(end.position, up_to)
        if position == end.position and not any(table.is_waiting for table in self._tables):
            return
        parts = [table.batches() for table in self._tables]
        batches = tuple(batch for made, _ in parts for batch in made)
        proof = Proof.of(batches, after=end.chain)
        self._log.append(Group(batches=batches, position=position, previous_position=end.position, proof=proof))
        for table, (_, refusals) in zip(self._tables, parts, strict=True):
            table.settle(refusals)


class LakeTableWriter:
    """Appends documents to the app's log, one group per flush. Serves one thread."""

    def __init__(self, schema: TableSchema, log: AppLog) -> None:
        self.name = schema.name.short
        self.log = log
        self._schema = schema
        self._arrow = change_schema(schema)
        self._pending: dict[Any, Document] = {}
        self._columns: list[pa.Table] = []
        self._refused: dict[Any, Refusal] = {}
        log.join(self)

    def write(self, documents: Sequence[Document]) -> None:
        """Keep documents for the next flush, the newest of each key."""
        for document in documents:
            waiting = self._pending.get(document.key)
            if waiting is None or waiting.version <= document.version:
                self._pending[document.key] = document

    def write_batch(self, batch: DocumentBatch) -> None:
        """As `write`, of columns; they stay columns all the way into the log."""
        (key,) = self._schema.key
        rows = change_rows(batch, self._arrow, key=key)
        if rows is None or self._pending:
            # What was written one by one may be older or newer; seldom, so it is not worth a second way.
            self.write(batch.documents())
        elif rows.num_rows:
            self._columns.append(rows)

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """Append what was written as one group, durable when this returns; a document that a column cannot take
        is refused, with the name of the column. The other tables of the app are in the same group.

        Raises:
            LogFullError: no space; the next flush tries the same documents again.
        """
        self.log.flush(up_to=up_to)
        refusals, self._refused = list(self._refused.values()), {}
        return refusals

    def close(self) -> None:
        """Let go of the log."""
        self.log.leave(self)

    # For the flush of all tables

    @property
    def is_waiting(self) -> bool:
        """Whether anything was written since the last flush."""
        return bool(self._pending or self._columns)

    def batches(self) -> tuple[tuple[ChangeBatch, ...], Sequence[Refusal]]:
        """What was written as a batch, and refusals of what its columns cannot take."""
        # Changes stand in the log in the order of their identity, which is what slicing it relies on.
        documents = sorted(self._pending.values(), key=lambda document: document.version)
        batches, refusals = self._fitting(documents) if documents else ((), [])
        if self._columns:
            (key,) = self._schema.key
            pieces = [*self._columns, *(pa.Table.from_batches([batch.rows]) for batch in batches)]
            batches = (ChangeBatch(self._schema, newest_in_order(pieces, key=key)),)
        return batches, refusals

    def settle(self, refusals: Sequence[Refusal]) -> None:
        """Forget what was written, because it is in the log; the next `flush` gives the refusals."""
        # A document that was written again since is judged anew.
        judged = self._pending.keys()
        self._refused = {key: refusal for key, refusal in self._refused.items() if key not in judged}
        self._refused |= {refusal.key: refusal for refusal in refusals}
        self._pending.clear()
        self._columns.clear()

    def _fitting(self, documents: Sequence[Document]) -> tuple[tuple[ChangeBatch, ...], list[Refusal]]:
        """The documents whose values their columns can take as a batch, and refusals of the others."""
        try:
            return (self._batch(documents),), []
        except DocumentShapeError:
            # Rare, so only now is each looked at for itself.
            refusals = {document.key: refusal for document in documents if (refusal := self._refusal(document))}
        fitting = [document for document in documents if document.key not in refusals]
        return ((self._batch(fitting),) if fitting else ()), list(refusals.values())

    def _refusal(self, document: Document) -> Refusal | None:
        try:
            self._batch([document])
        except DocumentShapeError as error:
            return Refusal(key=document.key, version=document.version, reason=str(error))
        return None

    def _batch(self, documents: Sequence[Document]) -> ChangeBatch:
        count = len(documents)
        (key,) = self._schema.key
        meta: list[Sequence[Any]] = [
            [DELETE if document.body is None else UPDATE for document in documents],
            [document.version.position.value for document in documents],
            [document.version.ordinal for document in documents],
            [0] * count,
            [document.committed_at for document in documents],
            [None] * count,
            [None] * count,
            [None] * count,
        ]
        bodies = [{key: document.key} if document.body is None else document.body for document in documents]
        columns = [[body.get(name) for body in bodies] for name in self._schema.names]
        # A step over tables may leave the key out of what it makes: `_key` says it.
        keys = [body.get(key, document.key) for body, document in zip(bodies, documents, strict=True)]
        columns[self._schema.names.index(key)] = keys
        arrays = [self._array(field_, values) for field_, values in zip(self._arrow, [*meta, *columns], strict=True)]
        return ChangeBatch(self._schema, pa.RecordBatch.from_arrays(arrays, schema=self._arrow))

    def _array(self, column: pa.Field, values: Sequence[Any]) -> pa.Array:
        try:
            return pa.array(values, column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            # Arrow's own message quotes the value, which a log must not.
            raise DocumentShapeError(
                f"cannot write lake table {self.name!r}: column {column.name!r} is {column.type} and a document "
                "has something else there; mend the transform or the declared type"
            ) from error


def _declared(schema: type) -> dict[str, Any]:
    return {item.name: item.type for item in fields_of(schema)}
