"""The oracle of the columnar decoder: message by message, row by row, value by value, in plain Python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat

import pyarrow as pa
from capture.row_messages import NO_TRANSACTION, UNCHANGED, Begin, Commit, Delete, Insert, Message, Row, Update

from deltaworks.capture.postgres.batches import gather_texts
from deltaworks.capture.postgres.clock import from_epoch_us
from deltaworks.capture.postgres.columnar import MARK_PREFIX
from deltaworks.capture.postgres.logical_messages import MESSAGE_SCHEMA, OUR_PREFIX
from deltaworks.capture.postgres.pgoutput import LogicalMessage, MalformedMessageError, Relation, Truncate
from deltaworks.capture.postgres.scan import POSTGRES_EPOCH_US
from deltaworks.capture.postgres.types import Held, to_arrow
from deltaworks.capture.source import Slice
from deltaworks.change import BEFORE, CREATE, DELETE, MESSAGE, OLD_KEY, TRUNCATE, UPDATE, ChangeBatch, change_schema
from deltaworks.position import START, Lsn
from deltaworks.schema import TableSchema

_XID_SPAN = 1 << 32


@dataclass(slots=True)
class XidClock:
    """Widens the 32-bit transaction ids of the WAL to the 64 bits of `xid8`.

    >>> clock = XidClock((1 << 32) + 5)
    >>> clock.widen(7) == (1 << 32) + 7, clock.widen(0xFFFFFFF0) == 0xFFFFFFF0
    (True, True)
    """

    nearby: int
    """A 64-bit id less than 2^31 transactions away from the next one to widen."""

    def widen(self, xid: int) -> int:
        """The 64-bit id nearest to the last ones; the server never keeps ids 2^31 apart."""
        wide = (self.nearby & ~(_XID_SPAN - 1)) | xid
        if wide - self.nearby > _XID_SPAN // 2:
            wide -= _XID_SPAN
        elif self.nearby - wide > _XID_SPAN // 2:
            wide += _XID_SPAN
        self.nearby = max(self.nearby, wide)
        return wide


@dataclass(slots=True)
class SliceBuilder:
    """Takes messages in the order of the WAL and gives slices of whole transactions.

    `describe` gives the schema of a relation, or `None` for a table that is not captured.
    """

    describe: Callable[[Relation], TableSchema | None]
    clock: XidClock
    position: Lsn = START
    change_count: int = 0
    """Changes of whole transactions since the last `take`."""
    mark: str | None = None
    """Set when the slice must be taken now, before the next message."""
    in_transaction: bool = False
    _tables: dict[int, "_TableRows | None"] = field(default_factory=dict)
    _relations: dict[int, Relation] = field(default_factory=dict)
    _rows: dict[int, "_TableRows"] = field(default_factory=dict)
    _begun: Begin = NO_TRANSACTION
    _pending_mark: str | None = None
    _mark_committed_at_us: int = 0
    _ordinal: int = 0
    _transaction_count: int = 0
    _messages: "_TableRows" = field(default_factory=lambda: _TableRows(MESSAGE_SCHEMA))

    def feed(self, message: Message) -> None:
        """Take the next message.

        Raises:
            MalformedMessageError: it does not fit the ones before it.
        """
        action = _ACTIONS.get(type(message))
        if action is not None:
            action(self, message)

    def advance(self, position: Lsn) -> None:
        """Note that everything committed up to `position` has been fed; ignored inside a transaction."""
        if not self.in_transaction and position > self.position:
            self.position = position

    def take(self, *, is_awaited: bool = False) -> Slice:
        """All whole transactions since the last call; must not be called inside one."""
        batches = tuple(rows.build() for rows in self._rows.values())
        taken = Slice(
            batches=batches,
            position=self.position,
            transaction_count=self._transaction_count,
            mark=self.mark,
            mark_position=self.position if self.mark is not None else None,
            mark_committed_at=from_epoch_us(self._mark_committed_at_us) if self.mark is not None else None,
            is_awaited=is_awaited,
        )
        self._rows.clear()
        self.change_count = self._transaction_count = 0
        self.mark = None
        return taken

    def _begin(self, message: Begin) -> None:
        self._begun = message
        self.in_transaction = True
        self._ordinal = 0

    def _commit(self, message: Commit) -> None:
        if not self.in_transaction or message.commit_lsn != self._begun.commit_lsn:
            raise MalformedMessageError(f"cannot end the transaction at {Lsn(message.commit_lsn)}: it did not begin")
        txid = self.clock.widen(self._begun.xid)
        for rows in self._rows.values():
            rows.close_transaction(commit=message.end_lsn, txid=txid, committed_at_us=message.committed_at_us)
        self.in_transaction = False
        # Reading resumes behind the commit record, so its end is the position that excludes this transaction.
        self.position = Lsn(message.end_lsn)
        self.change_count += self._ordinal
        self._transaction_count += self._ordinal > 0
        if self._pending_mark is not None:
            self.mark, self._pending_mark = self._pending_mark, None
            self._mark_committed_at_us = message.committed_at_us

    def _relation(self, message: Relation) -> None:
        # The server repeats itself, e.g. after ANALYZE. Under identity full the message does not show the key.
        if self._relations.get(message.id) == message and message.identity != "f":
            return
        self._relations[message.id] = message
        schema = self.describe(message)
        known = self._tables.get(message.id)
        if schema is None:
            self._tables[message.id] = None
        elif known is None or known.schema != schema:
            self._tables[message.id] = _TableRows(schema)

    def _insert(self, message: Insert) -> None:
        rows = self._table(message.relation_id)
        if rows is not None:
            rows.add(CREATE, self._next_ordinal(), message.new)

    def _update(self, message: Update) -> None:
        rows = self._table(message.relation_id)
        if rows is not None:
            rows.add_update(self._next_ordinal(), message)

    def _delete(self, message: Delete) -> None:
        rows = self._table(message.relation_id)
        if rows is not None:
            rows.add_delete(self._next_ordinal(), message)

    def _truncate(self, message: Truncate) -> None:
        for relation_id in message.relation_ids:
            rows = self._table(relation_id)
            if rows is not None:
                rows.add(TRUNCATE, self._next_ordinal(), [None] * len(rows.schema.columns))

    def _logical_message(self, message: LogicalMessage) -> None:
        if not message.prefix.startswith(OUR_PREFIX):
            self._add_message(message)
        # One outside of a transaction comes out of order, so it marks nothing.
        elif message.transactional and message.prefix == MARK_PREFIX and self._pending_mark is None:
            self._pending_mark = message.content.decode()

    def _add_message(self, message: LogicalMessage) -> None:
        rows = self._rows.setdefault(id(self._messages), self._messages)
        texts = [message.prefix.encode(), message.content, b"t" if message.transactional else b"f"]
        if self.in_transaction:
            rows.add(MESSAGE, self._next_ordinal(), texts)
            return
        rows.add(MESSAGE, 0, texts)
        rows.close_transaction(commit=message.lsn + 1, txid=0, committed_at_us=POSTGRES_EPOCH_US)
        self.position = max(self.position, Lsn(message.lsn + 1))
        self.change_count += 1

    def _table(self, relation_id: int) -> "_TableRows | None":
        if not self.in_transaction or relation_id not in self._tables:
            raise MalformedMessageError(
                f"cannot place a change of relation {relation_id} after {self.position}: no description came before it"
            )
        rows = self._tables[relation_id]
        if rows is not None:
            # Keyed by shape, in order of first change: the rows of one shape stay one batch.
            self._rows.setdefault(id(rows), rows)
        return rows

    def _next_ordinal(self) -> int:
        ordinal = self._ordinal
        self._ordinal = ordinal + 1
        return ordinal


@dataclass(slots=True)
class _TableRows:
    """Changes of one table in one shape, as the server sent them."""

    schema: TableSchema
    rows: list[Row] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    unchanged: dict[int, list[str]] = field(default_factory=dict)
    old_keys: dict[int, list[bytes | None]] = field(default_factory=dict)
    before: dict[int, list[bytes | None]] = field(default_factory=dict)
    transactions: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(rows, commit, txid, committed_at_us) of every transaction in here."""
    closed: int = 0
    arrow: pa.Schema = field(init=False)
    key_at: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.arrow = change_schema(self.schema)
        self.key_at = [self.schema.names.index(name) for name in self.schema.key]

    def add(self, op: str, ordinal: int, row: Row) -> None:
        self.ops.append(op)
        self.ordinals.append(ordinal)
        self.rows.append(row)

    def add_update(self, ordinal: int, update: Update) -> None:
        new, old = update.new, update.old
        if UNCHANGED in new:
            self._settle_unchanged(new, old)
        if old is not None:
            old_key = [old[at] for at in self.key_at]
            if old_key != [new[at] for at in self.key_at]:
                self.old_keys[len(self.rows)] = old_key  # type: ignore[assignment]  # an old row has no marker
            self.before[len(self.rows)] = old  # type: ignore[assignment]  # as above
        self.add(UPDATE, ordinal, new)

    def add_delete(self, ordinal: int, delete: Delete) -> None:
        self.before[len(self.rows)] = delete.old  # type: ignore[assignment]  # as above
        self.add(DELETE, ordinal, self.key_only(delete.old))

    def key_only(self, old: Row) -> Row:
        row: Row = [None] * len(old)
        for at in self.key_at:
            row[at] = old[at]
        return row

    def close_transaction(self, *, commit: int, txid: int, committed_at_us: int) -> None:
        count = len(self.rows) - self.closed
        if count:
            self.transactions.append((count, commit, txid, committed_at_us))
            self.closed = len(self.rows)

    def build(self) -> ChangeBatch:
        """The rows as a batch; starts anew."""
        count = len(self.rows)
        held = self._columns()
        old_key, old_texts = self._old_rows(
            self.old_keys, self.key_at, count, kind=self.arrow.field("_old_key").type, prefix=OLD_KEY
        )
        before: list[pa.Array] = []
        if self.schema.has_before:
            places = list(range(len(self.schema.columns)))
            array, texts = self._old_rows(
                self.before, places, count, kind=self.arrow.field(BEFORE).type, prefix=f"{BEFORE}."
            )
            before, old_texts = [array], old_texts + texts
        meta = [
            pa.array(self.ops, pa.string()),
            self._of_transactions(1, pa.uint64()),
            pa.array(self.ordinals, pa.uint32()),
            self._of_transactions(2, pa.uint64()),
            self._of_transactions(3, pa.int64()).view(pa.timestamp("us", "UTC")),
            _sparse(self.unchanged, count, self.arrow.field("_unchanged").type),
            old_key,
            gather_texts(chain(zip(self.schema.names, held, strict=True), old_texts), row_count=count),
        ]
        batch = pa.RecordBatch.from_arrays([*meta, *(column.array for column in held), *before], schema=self.arrow)
        for kept in (
            self.rows,
            self.ops,
            self.ordinals,
            self.unchanged,
            self.old_keys,
            self.before,
            self.transactions,
        ):
            kept.clear()
        self.closed = 0
        return ChangeBatch(self.schema, batch)

    def _settle_unchanged(self, new: Row, old: Row | None) -> None:
        """Fill markers from the old row where it has the value (identity full, or a large key); note the others."""
        for at, value in enumerate(new):
            if value is UNCHANGED:
                new[at] = filled = old[at] if old is not None else None
                # A value kept out of line is never null, so a null here only says that it was not sent.
                if filled is None:
                    self.unchanged.setdefault(len(self.rows), []).append(self.schema.columns[at].name)

    def _columns(self) -> list[Held]:
        try:
            texts: list[tuple[bytes | None, ...]] = list(zip(*self.rows, strict=True))
        except ValueError as error:
            raise MalformedMessageError(f"cannot read rows of {self.schema.name}: they differ in length") from error
        if len(texts) != len(self.schema.columns):
            raise MalformedMessageError(
                f"cannot read rows of {self.schema.name}: {len(texts)} values for {len(self.schema.columns)} columns"
            )
        return [to_arrow(values, column.type) for column, values in zip(self.schema.columns, texts, strict=True)]

    def _old_rows(
        self,
        rows_before: Mapping[int, list[bytes | None]],
        places: list[int],
        count: int,
        *,
        kind: pa.DataType,
        prefix: str,
    ) -> tuple[pa.Array, list[tuple[str, Held]]]:
        """Columns of rows before their change, and the values that a column's type does not hold as texts."""
        if not rows_before:
            return pa.nulls(count, kind), []
        rows = list(rows_before)
        parts = [
            to_arrow([rows_before[row][place] for row in rows], self.schema.columns[at].type)
            for place, at in enumerate(places)
        ]
        sent = pa.StructArray.from_arrays([part.array for part in parts], fields=list(kind))
        place_of_row = {row: place for place, row in enumerate(rows)}
        array = sent.take(pa.array([place_of_row.get(row) for row in range(count)], pa.int32()))
        return array, [
            (
                prefix + self.schema.names[at],
                Held(part.array, {rows[place]: text for place, text in part.texts.items()}),
            )
            for at, part in zip(places, parts, strict=True)
        ]

    def _of_transactions(self, part: int, kind: pa.DataType) -> pa.Array:
        return pa.array(chain.from_iterable(repeat(entry[part], entry[0]) for entry in self.transactions), kind)


def _sparse(values: Mapping[int, object], count: int, kind: pa.DataType) -> pa.Array:
    return pa.array([values.get(row) for row in range(count)], kind) if values else pa.nulls(count, kind)


_ACTIONS: dict[type, Callable[[SliceBuilder, Message], None]] = {  # each action takes the kind it stands for
    Begin: SliceBuilder._begin,  # type: ignore[dict-item]
    Commit: SliceBuilder._commit,  # type: ignore[dict-item]
    Relation: SliceBuilder._relation,  # type: ignore[dict-item]
    Insert: SliceBuilder._insert,  # type: ignore[dict-item]
    Update: SliceBuilder._update,  # type: ignore[dict-item]
    Delete: SliceBuilder._delete,  # type: ignore[dict-item]
    Truncate: SliceBuilder._truncate,  # type: ignore[dict-item]
    LogicalMessage: SliceBuilder._logical_message,  # type: ignore[dict-item]
}
