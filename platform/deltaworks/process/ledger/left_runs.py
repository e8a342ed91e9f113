"""What left an app that keeps no rows, stored in its state as runs, and merged before they grow without bounds.

    range ──► run ──► parts ──┐ as soon as those that are not merged hold twice as many documents as the others
    range ──► run ──► parts ──┼──► scatter: pieces ──► gather: the newest of each key of a bucket ──► merged parts
    range ──► run ──► parts ──┘    bucket by bucket of keys, so that one is in memory at a time

A run has the columns that `left` says; a part is a piece of one with at most `PART` documents. Of a key the part with
the highest id, and of one id the one with the highest part, has what counts. Parts take 4 to 25 bytes for each
document, and hold at most six times the keys that ever left and `LOOSE_AT_LEAST` more.

Parts of which none has a key between the lowest and the highest of another, as a dump in the order of its keys makes
them, are merged as they are, unless they are small. The merging of others is done in steps beside the runs that are
added, in the transactions of those, and how far it went is in the tables: so it can be rolled back and broken off
anywhere. Until the end the parts that it read stay where they are, and readers find a key there or in what is merged,
where it is the same.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.capture.proof import text_hashes
from deltaworks.process.declared import KEY
from deltaworks.process.direct.places import Integers, ascending, last_by_key, last_of_each

LOOSE_AT_LEAST = 1 << 22
"""Documents that may be in parts before they are merged, however few keys there are."""
PART = 1 << 18
"""Documents of one part at most, and of half a bucket: what is in memory at a time, and worked on at once."""
STEP_PER_ADDED = 4
"""Documents that are cut or gathered for each that is added: of N each is both, so N / 2 come meanwhile."""
_SAMPLED = 64
"""Keys of a part that tell how those of all parts lie."""

_STATEMENTS = (
    """
    create table if not exists left_run (
      id int not null, part int not null, documents int not null, is_merged int not null, body blob not null,
      primary key (id, part))
    """,
    # Beside the bodies, which are large. Parts from before there was this table have no row until they are merged.
    """
    create table if not exists left_span (
      id int, part int, lowest int, highest int, sample blob, merging int, primary key (id, part)) without rowid
    """,
    # One row while parts are merged. `bounds`: the lowest key of each bucket of integers but the first.
    """
    create table if not exists left_merge (
      up_to int, buckets int, bounds blob, part int, next_bucket int, credit int)
    """,
    "create table if not exists left_piece (seq integer primary key, bucket int, body blob)",
    "create index if not exists left_piece_of on left_piece (bucket)",
)
_TO_CUT, _CUT = 0, 1


class _Part(NamedTuple):
    """What is known of a part without reading it; keys that are no integers have no lowest and highest one."""

    id: int
    part: int
    documents: int
    lowest: int | None
    highest: int | None
    sample: bytes | None


class LeftRuns:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def create(self) -> None:
        """Make the tables."""
        for statement in _STATEMENTS:
            self._connection.execute(statement)

    def add(self, run: pa.Table) -> None:
        """Note what every sink has made durable; inside the transaction that settles it."""
        if not run.num_rows:
            return
        newest, loose, merged = self._connection.execute(
            """
            select ifnull(max(id), 0), total(iif(is_merged, 0, documents)), total(iif(is_merged, documents, 0))
            from left_run
            """
        ).fetchone()
        self._write(newest + 1, run, is_merged=False)
        if self._is_merging():
            self._go_on(STEP_PER_ADDED * run.num_rows)
        elif loose + run.num_rows > max(LOOSE_AT_LEAST, 2 * merged):
            self._begin(newest + 1)

    def _is_merging(self) -> bool:
        return self._connection.execute("select 1 from left_merge").fetchone() is not None

    def _begin(self, up_to: int) -> None:
        """Choose what has to be merged, of the parts up to this id; the others count as merged already."""
        found = self._connection.execute(
            """
            select id, part, documents, lowest, highest, sample from left_run left join left_span using (id, part)
            where id <= ?
            """,
            (up_to,),
        )
        chosen = _entangled([_Part(*row) for row in found])
        self._connection.execute("update left_run set is_merged = 1 where id <= ? and not is_merged", (up_to,))
        if not chosen:
            return
        self._mark([(part.id, part.part) for part in chosen], _TO_CUT)
        # After all parts of that id, of which what is merged has the newest.
        (part,) = self._connection.execute("select max(part) + 1 from left_run where id = ?", (up_to,)).fetchone()
        buckets = -(-sum(each.documents for each in chosen) // (2 * PART))
        self._connection.execute(
            "insert into left_merge values (?, ?, ?, ?, 0, 0)",
            (up_to, buckets, _bounds(chosen, buckets).tobytes(), part),
        )

    def _mark(self, parts: Sequence[tuple[int, int]], merging: int) -> None:
        self._connection.executemany(
            "insert into left_span (id, part, merging) values (?, ?, ?) on conflict do update set merging = ?3",
            ((run_id, part, merging) for run_id, part in parts),
        )

    def _go_on(self, credit: int) -> None:
        """Do steps of the merging that is under way until they are as many documents as this, or it is done."""
        (left_over,) = self._connection.execute("select credit from left_merge").fetchone()
        credit += left_over
        while credit > 0 and self._is_merging():
            credit -= self._cut() or self._gather()
        self._connection.execute("update left_merge set credit = ?", (credit,))

    def _cut(self) -> int:
        """Cut the next parts into pieces by bucket, as many as make up one; gives their documents, 0 at the end."""
        found = self._connection.execute(
            f"""
            select id, part, documents, body from left_span join left_run using (id, part)
            where merging = {_TO_CUT} order by id, part
            """
        )
        parts: list[tuple[int, int]] = []
        runs: list[pa.Table] = []
        documents = 0
        with closing(found):
            for run_id, part, count, body in found:
                if runs and documents + count > PART:
                    break
                run = _decoded(body)
                if runs and run.schema.field(KEY) != runs[0].schema.field(KEY):
                    break
                parts.append((run_id, part))
                runs.append(run)
                documents += count
        if not runs:
            return 0
        buckets, bounds = self._connection.execute("select buckets, bounds from left_merge").fetchone()
        rows = pa.concat_tables(runs).unify_dictionaries()
        self._connection.executemany(
            "insert into left_piece (bucket, body) values (?, ?)",
            ((place, _encoded(each)) for place, each in _pieces(rows, buckets, np.frombuffer(bounds, np.int64))),
        )
        self._mark(parts, _CUT)
        return documents

    def _gather(self) -> int:
        """Merge the next bucket and give the documents that went in; after the last one drop what was merged."""
        up_to, part, bucket = self._connection.execute("select up_to, part, next_bucket from left_merge").fetchone()
        (bucket,) = self._connection.execute(
            "select min(bucket) from left_piece where bucket >= ?", (bucket,)
        ).fetchone()
        if bucket is None:
            self._connection.execute(
                f"delete from left_run where (id, part) in (select id, part from left_span where merging = {_CUT})"
            )
            self._connection.execute(f"delete from left_span where merging = {_CUT}")
            self._connection.execute("delete from left_merge")
            return 0
        stored = self._connection.execute("select body from left_piece where bucket = ? order by seq", (bucket,))
        rows = pa.concat_tables([_decoded(body) for (body,) in stored]).unify_dictionaries()
        # Column by column, each in one piece: of many pieces, taking is three times as slow.
        taken = pa.array(_newest(rows.column(KEY).combine_chunks()))
        merged = pa.table({name: rows.column(name).combine_chunks().take(taken) for name in rows.column_names})
        part = self._write(up_to, merged, is_merged=True, part=part)
        self._connection.execute("delete from left_piece where bucket = ?", (bucket,))
        self._connection.execute("update left_merge set part = ?, next_bucket = ?", (part, bucket + 1))
        return rows.num_rows  # type: ignore[no-any-return]  # pyarrow has no types

    def _write(self, run_id: int, run: pa.Table, *, is_merged: bool, part: int = 0) -> int:
        """Store a run from this part on, and give the part after its last."""
        # Parts of one size: one with the few that are left over would be merged with others that are not near it.
        size = -(-run.num_rows // -(-run.num_rows // PART))
        for start in range(0, run.num_rows, size):
            rows = run.slice(start, size)
            self._connection.execute(
                "insert into left_run values (?, ?, ?, ?, ?)", (run_id, part, rows.num_rows, is_merged, _encoded(rows))
            )
            self._connection.execute(
                "insert into left_span values (?, ?, ?, ?, ?, null)", (run_id, part, *_spread(rows.column(KEY)))
            )
            part += 1
        return part


def read_runs(connection: sqlite3.Connection) -> Iterator[pa.Table]:
    """The runs in the order in which they left; of a key the last one counts."""
    for (body,) in connection.execute("select body from left_run order by id, part"):
        yield _decoded(body)


def _entangled(parts: Sequence[_Part]) -> list[_Part]:
    """Those that may have a key of another one, or are so small that there would be too many."""
    found: list[_Part] = []
    together: list[_Part] = []
    highest = 0
    for part in sorted(parts, key=lambda each: (each.lowest is not None, each.lowest or 0)):
        if part.lowest is None or part.highest is None:
            found.append(part)
            continue
        if together and part.lowest > highest:
            found += together if _is_worth_it(together) else []
            together = []
        highest = max(highest, part.highest) if together else part.highest
        together.append(part)
    found += together if _is_worth_it(together) else []
    return found if len(found) > 1 else []


def _is_worth_it(parts: Sequence[_Part]) -> bool:
    return len(parts) > 1 or any(part.documents < PART // 4 for part in parts)


def _bounds(parts: Sequence[_Part], buckets: int) -> npt.NDArray[np.int64]:
    """The lowest key of each bucket of integers but the first, so that each has about as many documents."""
    samples = [(np.frombuffer(part.sample, np.int64), part.documents) for part in parts if part.sample is not None]
    if not samples:
        return np.empty(0, np.int64)
    keys = np.concatenate([sample for sample, _ in samples])
    weights = np.concatenate([np.full(len(sample), documents / len(sample)) for sample, documents in samples])
    order = np.argsort(keys, kind="stable")
    below = np.cumsum(weights[order])
    wanted = below[-1] * np.arange(1, buckets) / buckets
    return np.unique(keys[order][np.searchsorted(below, wanted)])


def _pieces(run: pa.Table, buckets: int, bounds: npt.NDArray[np.int64]) -> Iterator[tuple[int, pa.Table]]:
    """The documents of each bucket, in their order. Keys that are no integers have buckets of their own, by hash."""
    keys = run.column(KEY).combine_chunks()
    if (values := ascending(keys)) is not None:
        edges = np.searchsorted(values, bounds)
        for bucket, (start, end) in enumerate(zip([0, *edges], [*edges, len(values)], strict=True)):
            if end > start:
                yield bucket, run.slice(start, end - start)
        return
    if pa.types.is_integer(keys.type):
        found = np.searchsorted(bounds, keys.to_numpy(), side="right")
    else:
        found = buckets + (text_hashes(keys.cast(pa.string())) % np.uint64(buckets)).astype(np.int64)
    # Small numbers are put in order by counting them.
    order = np.argsort(found.astype(np.uint16) if 2 * buckets < 1 << 16 else found, kind="stable")
    here, starts = np.unique(found[order], return_index=True)
    run = run.combine_chunks().take(pa.array(order))
    for bucket, start, end in zip(here.tolist(), starts, [*starts[1:], len(order)], strict=True):
        yield bucket, run.slice(start, end - start)


def _newest(keys: pa.Array) -> Integers:
    """The place of the last of each key; integers come out sorted, which the next merge cuts without moving any."""
    if not pa.types.is_integer(keys.type):
        return last_of_each(keys)
    return last_by_key(keys.to_numpy())


def _spread(keys: pa.ChunkedArray) -> tuple[int | None, int | None, bytes | None]:
    """The lowest and the highest key, and some of them; nothing of keys that are no integers."""
    if not pa.types.is_integer(keys.type):
        return None, None, None
    values = keys.to_numpy()
    return int(values.min()), int(values.max()), values[:: -(-len(values) // _SAMPLED)].astype(np.int64).tobytes()


def _encoded(run: pa.Table) -> memoryview:
    """Large numbers as steps from row to row, which are small and compress well."""
    steps = _changed(run, _steps).combine_chunks()
    body = pa.BufferOutputStream()
    with pa.ipc.new_stream(body, steps.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(steps)
    return memoryview(body.getvalue())


def _decoded(body: bytes) -> pa.Table:
    return _changed(pa.ipc.open_stream(body).read_all(), lambda values: np.cumsum(values, dtype=values.dtype))


def _steps(values: Integers) -> Integers:
    steps = np.empty_like(values)
    steps[:1] = values[:1]
    np.subtract(values[1:], values[:-1], out=steps[1:])
    return steps


def _changed(run: pa.Table, change: Callable[[Integers], Integers]) -> pa.Table:
    for place, name in enumerate(run.column_names[:2]):
        if pa.types.is_integer(run.column(place).type):
            run = run.set_column(place, name, pa.array(change(run.column(place).to_numpy())))
    return run
