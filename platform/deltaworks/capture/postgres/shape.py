"""A table in one shape: its changes become one Arrow batch, column by column."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.batches import gather_texts
from deltaworks.capture.postgres.binary_cells import read_streamed_cells
from deltaworks.capture.postgres.cells import (
    AS_BINARY_FORMAT,
    AS_TEXT_FORMAT,
    UNCHANGED_SIZE,
    Cells,
    locate,
    read_cells,
)
from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs
from deltaworks.capture.postgres.types import Held
from deltaworks.change import BEFORE, META_COLUMNS, OLD_KEY, ChangeBatch, change_schema
from deltaworks.schema import TableSchema


class UnreadableRowError(Exception):
    """The change in this line of `changes` does not follow the protocol; it never leaves this package."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line


@dataclass(slots=True)
class Shape:
    """Builds the batches of a table as `schema` describes it."""

    schema: TableSchema
    _arrow: pa.Schema = field(init=False)
    _key_at: list[int] = field(init=False)
    _is_key: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self._arrow = change_schema(self.schema)
        self._key_at = [self.schema.names.index(name) for name in self.schema.key]
        self._is_key = np.zeros(len(self.schema.columns), np.uint8)
        self._is_key[self._key_at] = 1

    def build(self, data: Bytes, changes: Longs, lines: Longs, transactions: Longs) -> ChangeBatch:
        """The changes in these lines as a batch that shares no memory with `data`.

        Raises:
            UnreadableRowError: one of them is malformed.
        """
        found = self._locate(data, changes, lines)
        columns = [self._read(found, cells, at) for at, cells in enumerate(found.cells())]
        old_key, old_texts = self._old_keys(found)
        taken = changes[lines]
        before, before_texts = self._before(found, taken[:, scan.OLD] != 0) if self.schema.has_before else ([], [])
        of_transaction = transactions[taken[:, scan.TRANSACTION]]
        meta = {
            "_op": _letters(taken[:, scan.OP]),
            "_commit": pa.array(of_transaction[:, scan.COMMIT].astype(np.uint64)),
            "_ordinal": pa.array(taken[:, scan.PLACE].astype(np.uint32)),
            "_txid": pa.array(of_transaction[:, scan.TXID].astype(np.uint64)),
            "_committed_at": pa.array(of_transaction[:, scan.AT_US].copy()).view(pa.timestamp("us", "UTC")),
            "_unchanged": self._unchanged(found.sizes),
            "_old_key": old_key,
            "_as_text": gather_texts(
                chain(zip(self.schema.names, columns, strict=True), old_texts, before_texts), row_count=len(lines)
            ),
        }
        arrays = [*(meta[name] for name in META_COLUMNS), *(column.array for column in columns), *before]
        return ChangeBatch(self.schema, pa.RecordBatch.from_arrays(arrays, schema=self._arrow))

    def _locate(self, data: Bytes, changes: Longs, lines: Longs) -> "_Found":
        count = len(self._is_key), len(lines)
        found = _Found(
            data=data,
            starts=np.empty(count, np.int64),
            sizes=np.empty(count, np.int32),
            old_starts=np.empty(count, np.int64),
            old_sizes=np.empty(count, np.int32),
            moved=np.zeros(len(lines), np.uint8),
            first_line=int(lines[0]),
            formats=np.zeros(len(self._is_key), np.uint8),
        )
        bad = locate(
            data,
            changes,
            lines,
            self._is_key,
            found.starts,
            found.sizes,
            found.old_starts,
            found.old_sizes,
            found.moved,
            found.formats,
        )
        if bad >= 0:
            raise UnreadableRowError(int(lines[bad]))
        return found

    def _read(self, found: "_Found", cells: Cells, at: int) -> Held:
        """Cells of the column at this place, in the form in which they came."""
        column = self.schema.columns[at]
        if found.formats[at] & AS_BINARY_FORMAT == 0:
            return read_cells(cells, column.type)
        try:
            # One stream sends a type in one form; anything else is damage.
            if found.formats[at] & AS_TEXT_FORMAT:
                raise ValueError("values in both forms")
            return read_streamed_cells(cells, column)
        except ValueError as error:
            raise UnreadableRowError(found.first_line) from error

    def _unchanged(self, sizes: Ints) -> pa.Array:
        """The names of the columns that were not sent, per row."""
        kind = self._arrow.field("_unchanged").type
        unsent = (sizes == UNCHANGED_SIZE).T
        counts = unsent.sum(axis=1)
        if not counts.any():
            return pa.nulls(len(counts), kind)
        names = pa.array(self.schema.names, pa.string()).take(pa.array(np.nonzero(unsent)[1]))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), names, mask=pa.array(counts == 0))

    def _old_keys(self, found: "_Found") -> tuple[pa.Array, list[tuple[str, Held]]]:
        """The old keys, and their parts that a column's type does not hold under their names in `_as_text`."""
        kind = self._arrow.field("_old_key").type
        return self._old_columns(found, found.moved != 0, self._key_at, kind=kind, prefix=OLD_KEY)

    def _before(self, found: "_Found", is_sent: npt.NDArray[np.bool_]) -> tuple[list[pa.Array], list[tuple[str, Held]]]:
        """The whole rows before the changes."""
        kind, places = self._arrow.field(BEFORE).type, list(range(len(self.schema.columns)))
        array, texts = self._old_columns(found, is_sent, places, kind=kind, prefix=f"{BEFORE}.")
        return [array], texts

    def _old_columns(
        self, found: "_Found", is_sent: npt.NDArray[np.bool_], places: list[int], *, kind: pa.DataType, prefix: str
    ) -> tuple[pa.Array, list[tuple[str, Held]]]:
        """Columns of the old rows as a struct that is null where nothing `is_sent`, and their texts."""
        rows = np.flatnonzero(is_sent)
        if not len(rows):
            return pa.nulls(len(is_sent), kind), []
        parts = [
            self._read(found, Cells(found.data, found.old_starts[at][rows], found.old_sizes[at][rows]), at)
            for at in places
        ]
        sent = pa.StructArray.from_arrays([part.array for part in parts], fields=list(kind))
        place_of_row = np.zeros(len(is_sent), np.int32)
        place_of_row[rows] = np.arange(len(rows), dtype=np.int32)
        return sent.take(pa.array(place_of_row, mask=~is_sent)), [
            (
                prefix + self.schema.names[at],
                Held(part.array, {int(rows[place]): text for place, text in part.texts.items()}),
            )
            for at, part in zip(places, parts, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Where the values of some changes are: a line per column, a place per change."""

    data: Bytes
    starts: Longs
    sizes: Ints
    old_starts: Longs
    old_sizes: Ints
    moved: Bytes
    first_line: int
    formats: Bytes
    """In which forms values of a column came."""

    def cells(self) -> Iterator[Cells]:
        """The new values of each column."""
        for starts, sizes in zip(self.starts, self.sizes, strict=True):
            yield Cells(self.data, starts, sizes)


def _letters(codes: npt.NDArray[np.int64]) -> pa.Array:
    """A text of one letter per code."""
    offsets = np.arange(len(codes) + 1, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(codes.astype(np.uint8))]
    return pa.Array.from_buffers(pa.string(), len(codes), buffers)
