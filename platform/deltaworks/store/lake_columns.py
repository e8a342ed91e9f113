"""Documents that come as columns, as the changes that a lake table's log holds: no row becomes a Python object."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.change import DELETE, META_COLUMNS, UPDATE
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY


def change_rows(batch: DocumentBatch, schema: pa.Schema, *, key: str) -> pa.Table | None:
    """The batch in the log's `schema`, deletions last; `None` where a column is not of its declared type.

    Then only a look at each document can tell which of them fit.
    """
    kept = _rows(batch.meta, batch.bodies, schema, key=key, op=UPDATE)
    gone = _rows(batch.gone, None, schema, key=key, op=DELETE)
    return None if kept is None or gone is None else pa.concat_tables([kept, gone])


def newest_in_order(pieces: Sequence[pa.Table], *, key: str) -> pa.RecordBatch:
    """The newest row of each key, of equal versions the one that came last, in the order of their versions."""
    rows = pa.concat_tables(pieces)
    # Stable, so what came last is last among its equals.
    order = pc.sort_indices(rows, sort_keys=[("_commit", "ascending"), ("_ordinal", "ascending")]).to_numpy()
    if len(pieces) > 1:
        keys = rows.column(key).combine_chunks().dictionary_encode()
        codes = keys.indices.to_numpy()[order]
        last = np.empty(len(keys.dictionary), dtype=np.int64)
        # Of several values for one place, numpy keeps the last.
        last[codes] = np.arange(len(codes))
        order = order[np.sort(last)]
    if len(order) < rows.num_rows or np.any(order[1:] < order[:-1]):
        rows = rows.take(pa.array(order))
    return rows.combine_chunks().to_batches()[0]


def _rows(meta: pa.Table, bodies: pa.Table | None, schema: pa.Schema, *, key: str, op: str) -> pa.Table | None:
    count = meta.num_rows
    columns = []
    for field in schema:
        match field.name:
            case "_op":
                column = pa.chunked_array([pa.repeat(op, count).cast(field.type)])
            case "_txid":
                column = pa.chunked_array([pa.repeat(0, count).cast(field.type)])
            case "_commit" | "_ordinal" | "_committed_at":
                column = meta.column(field.name).cast(field.type)
            case name if name == key and (bodies is None or key not in bodies.schema.names):
                column = _as_declared(meta.column(KEY), field.type)
            case name if bodies is not None and name not in META_COLUMNS and name in bodies.schema.names:
                column = _as_declared(bodies.column(name), field.type)
            case _:
                column = pa.chunked_array([pa.nulls(count, field.type)])
        if column is None:
            return None
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _as_declared(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    """The column in its declared type where Python values of it would be taken too, and as the same."""
    if column.type.equals(kind):
        return column
    is_same_kind = pa.types.is_null(column.type) or (pa.types.is_integer(column.type) and pa.types.is_integer(kind))
    if not is_same_kind:
        return None
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return None
