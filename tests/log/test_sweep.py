"""The deletes of rows that are gone without a change, over every way in which a log speaks of a key."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log import sweep as sweeps
from deltaworks.log.change_log import Group
from deltaworks.log.memory import MemoryLog
from deltaworks.log.sweep import Sweep
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

TABLE = TableSchema(
    name=TableName("public", "t"),
    columns=(
        Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),
        Column(name="part", type=pa.string(), source_type="text", nullable=False),
    ),
    key=("id", "part"),
)
Change = tuple[str, int] | tuple[str, int, int]


def log_of(*groups: list[Change]) -> MemoryLog:
    """A log whose n-th group is at position n; a change is (op, id) or (op, id, id before)."""
    log = MemoryLog()
    with log.writer() as writer:
        for position, changes in enumerate(groups, start=1):
            rows: list[dict[str, Any]] = [
                {
                    "_op": change[0],
                    "_commit": position,
                    "_ordinal": ordinal,
                    "_txid": 0 if change[0] == "r" else position,
                    "_committed_at": 0,
                    "id": None if change[0] == "t" else change[1],
                    "part": None if change[0] == "t" else "p",
                    "_old_key": {"id": change[2], "part": "p"} if len(change) == 3 else None,
                }
                for ordinal, change in enumerate(changes)
            ]
            batch = ChangeBatch(TABLE, pa.RecordBatch.from_pylist(rows, schema=change_schema(TABLE)))
            writer.append(Group(batches=(batch,), position=Lsn(position), previous_position=writer.end().position))
    return log


def gone(log: MemoryLog, *, since: int) -> list[int]:
    """The ids that a sweep deletes."""
    sweep = Sweep(reader=log.reader())
    sweep.owe(TABLE.name, since=Lsn(since))
    end = log.reader().end()
    while not sweep.step(up_to_sequence=end.sequence):
        pass
    batches = sweep.deletes({TABLE.name: TABLE}, position=end.position, committed_at=datetime.now(UTC))
    assert not sweep.is_owed
    rows = [row for batch in batches for row in batch.rows.to_pylist()]
    assert all(row["_op"] == "d" and row["_commit"] == end.position.value for row in rows)
    assert len({row["_ordinal"] for row in rows}) == len(rows)
    return sorted(row["id"] for row in rows)


def test_key_without_a_word_after_the_position_is_deleted() -> None:
    log = log_of([("c", 1), ("c", 2), ("c", 3), ("c", 4)], [("u", 2), ("d", 4)], [("r", 1)], [("u", 3)])
    assert gone(log, since=2) == [2]


def test_nothing_is_deleted_where_the_dump_brought_everything() -> None:
    assert gone(log_of([("c", 1), ("c", 2)], [("r", 1), ("r", 2)]), since=1) == []


def test_row_that_moved_is_known_by_its_new_key_only() -> None:
    assert gone(log_of([("c", 1)], [("u", 2, 1)], [("r", 9)]), since=2) == [2]


def test_rows_that_swap_their_keys_in_one_transaction_are_both_known() -> None:
    log = log_of([("c", 1), ("c", 2)], [("u", 3, 1), ("u", 1, 2), ("u", 2, 3)], [("r", 1)])
    assert gone(log, since=2) == [2]


def test_rows_before_a_truncate_are_gone_already() -> None:
    assert gone(log_of([("c", 1), ("c", 2)], [("c", 3), ("t", 0), ("c", 4)], [("r", 5)]), since=2) == [4]


def test_row_that_was_deleted_and_came_back_is_kept() -> None:
    assert gone(log_of([("c", 1)], [("d", 1)], [("c", 1)]), since=2) == []


def test_words_are_made_one_per_key_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "COMPACTED_ROWS", 10)
    groups: list[list[Change]] = [[("u", id_) for id_ in range(50)] for _ in range(20)]
    log = log_of([("c", id_) for id_ in range(50)], *groups, [("r", id_) for id_ in range(0, 50, 2)])
    assert gone(log, since=21) == list(range(1, 50, 2))


def test_what_is_owed_outlives_the_process() -> None:
    sweep = Sweep(reader=MemoryLog().reader())
    sweep.owe(TABLE.name, since=Lsn(7), is_another=True)
    again = Sweep(reader=MemoryLog().reader())
    again.load(sweep.to_json(), tables=[TABLE.name])
    assert again.to_json() == sweep.to_json()
    again.load(sweep.to_json(), tables=[])
    assert not again.is_owed
