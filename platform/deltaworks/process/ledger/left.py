"""Runs: what left of one range, as columns, because a row of a table for each document is too slow.

A run has the keys and versions of documents: `_key`, `position`, `ordinal`, `minute` of the commit, `sinks` as
`sinks_text` gives them, and `is_gone` where the row itself is not there any more. A key is in it once. `left_runs`
stores them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.process.declared import KEY
from deltaworks.process.direct.flags import Flags, flag_array, flag_bits
from deltaworks.process.fold import Key
from deltaworks.process.sink import Document, key_text

_MINUTE_US = 60_000_000


def run_of_rows(rows: pa.Table, *, is_made: Flags, is_gone: Flags) -> pa.Table:
    """The newest change of each key: those that became a document, for all sinks, and those that are in none.

    `rows` has at least `_key`, `_commit`, `_ordinal` and `_committed_at`.
    """
    count = rows.num_rows
    # The one place that there is, in none of them, but for those that are in all.
    nowhere = pa.Array.from_buffers(
        pa.int32(), count, [flag_bits(~is_made), pa.py_buffer(np.zeros(count, np.int32))], null_count=-1
    )
    return pa.table(
        {
            KEY: rows.column(KEY),
            "position": rows.column("_commit"),
            "ordinal": rows.column("_ordinal"),
            "minute": pa.array(_minutes(rows.column("_committed_at"))),
            "sinks": pa.DictionaryArray.from_arrays(nowhere, pa.array([""])),
            "is_gone": flag_array(is_gone),
        }
    )


def _minutes(committed_at: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    if not len(committed_at):
        return np.empty(0, np.int32)
    microseconds: npt.NDArray[np.int64] = committed_at.cast(pa.int64()).to_numpy()
    minute = microseconds.min() // _MINUTE_US
    # Most ranges are of one minute, and a division takes longer than all the rest.
    if microseconds.max() // _MINUTE_US == minute:
        return np.full(len(microseconds), minute, np.int32)
    return (microseconds // _MINUTE_US).astype(np.int32)


def run_of_documents(
    documents: Sequence[Document], routes: Mapping[Key, Collection[str]], *, gone: Collection[Key]
) -> pa.Table:
    """The same of documents that are objects; `routes` has the sinks of those that are not for all."""
    return pa.table(
        {
            KEY: [each.key for each in documents],
            "position": pa.array([each.version.position.value for each in documents], pa.uint64()),
            "ordinal": pa.array([each.version.ordinal for each in documents], pa.uint32()),
            "minute": pa.array([int(each.committed_at.timestamp()) // 60 for each in documents], pa.int32()),
            "sinks": pa.array([sinks_text(each, routes) for each in documents], pa.string()).dictionary_encode(),
            "is_gone": pa.array([each.key in gone for each in documents], pa.bool_()),
        }
    )


def sinks_text(document: Document, routes: Mapping[Key, Collection[str]]) -> str | None:
    """The names of the sinks that it is in: `None` for all of them, empty where it is in none."""
    if document.body is None:
        return ""
    return ",".join(routes[document.key]) if document.key in routes else None


def stored_run(rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Rows of `left_document`, their keys as text where they are of no one type that Arrow has."""
    keys, positions, ordinals, minutes, sinks, is_gone = zip(*rows, strict=True)
    is_alike = all(type(key) is int for key in keys) or all(type(key) is str for key in keys)
    return pa.table(
        {
            KEY: pa.array(keys if is_alike else [key_text(key) for key in keys]),
            "position": pa.array(positions, pa.uint64()),
            "ordinal": pa.array(ordinals, pa.uint32()),
            "minute": pa.array(minutes, pa.int32()),
            "sinks": pa.array(sinks, pa.string()).dictionary_encode(),
            "is_gone": pa.array(map(bool, is_gone), pa.bool_()),
        }
    )
