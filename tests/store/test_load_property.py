"""However changes are cut into groups, slices and loads, the lake is the fold of all of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaworks.change import ChangeBatch
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.store import tables
from deltaworks.store.load import load
from deltaworks.store.tables import Tables
from deltaworks.testing.faults import fail_at

Key = tuple[int, str]
COLUMNS = ("left", "right")
TABLE = TableSchema(
    name=TableName("public", "pair"),
    columns=(
        Column(name="number", type=pa.int64(), source_type="bigint", nullable=False),
        Column(name="part", type=pa.string(), source_type="text", nullable=False),
        Column(name="left", type=pa.string(), source_type="text"),
        Column(name="right", type=pa.list_(pa.int32()), source_type="integer[]"),
    ),
    key=("number", "part"),
)


@dataclass
class Fold:
    """The reference: changes folded one by one in plain Python."""

    seen: dict[Key, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def apply(self, position: int, change: dict[str, Any]) -> None:
        key = (change["number"], change["part"]) if change["_op"] != "t" else None
        if change["_op"] == "t":
            self.seen.clear()
        elif change["_op"] == "d":
            self.seen.pop(key, None)
        else:
            old = change.get("_old_key")
            before = self.seen.pop((old["number"], old["part"]) if old else key, (0, {}))[1]
            unsent = change.get("_unchanged") or []
            self.seen[key] = (
                position,
                {name: before.get(name) if name in unsent else change.get(name) for name in COLUMNS},
            )


ALL_KEYS = [(number, part) for number in range(3) for part in "ab"]
OPERATIONS = (
    # Without moves, and with few kinds of them, each way through `apply` is met often.
    ["put", "put", "delete", "truncate"],
    ["put", "unsent", "unsent", "delete"],
    ["put", "unsent", "unsent", "move", "move", "delete", "truncate"],
)
values = st.fixed_dictionaries(
    {
        "left": st.none() | st.text(max_size=3),
        "right": st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=2),
    }
)


@st.composite
def histories(draw) -> list[list[dict[str, Any]]]:
    """Transactions that a database with a unique key could have had, seen by a log that began at any time."""
    live: set[Key] = set()
    operations = draw(st.sampled_from(OPERATIONS))
    transactions = []
    for _ in range(draw(st.integers(1, 12))):
        changes = []
        for _ in range(draw(st.integers(1, 6))):
            key = draw(st.sampled_from(ALL_KEYS))
            op = draw(st.sampled_from(operations))
            row = {"number": key[0], "part": key[1]}
            if op == "truncate" and draw(st.integers(0, 3)) == 0:
                changes.append({"_op": "t"})
                live.clear()
            elif op == "delete":
                changes.append({"_op": "d", **row})
                live.discard(key)
            elif op == "move":
                free = [other for other in ALL_KEYS if other not in live and other != key]
                if not free:
                    continue
                new = draw(st.sampled_from(free))
                unsent = draw(st.sets(st.sampled_from(COLUMNS)))
                changes.append(change_of("u", new, draw(values), unsent) | {"_old_key": row})
                live.discard(key)
                live.add(new)
            else:
                unsent = draw(st.sets(st.sampled_from(COLUMNS))) if op == "unsent" else set()
                changes.append(change_of("u" if unsent else draw(st.sampled_from("cur")), key, draw(values), unsent))
                live.add(key)
        transactions.append(changes)
    return transactions


def change_of(op: str, key: Key, sent: dict[str, Any], unsent: set[str]) -> dict[str, Any]:
    values = {name: None if name in unsent else value for name, value in sent.items()}
    return {"_op": op, "number": key[0], "part": key[1], "_unchanged": sorted(unsent) or None, **values}


def rows_of(connection, table: str) -> dict[Key, tuple[int, dict[str, Any]]]:
    rows = connection.execute(f'select number, part, _commit, "left", "right" from {table}').fetchall()
    found = {(number, part): (commit, {"left": left, "right": right}) for number, part, commit, left, right in rows}
    assert len(found) == len(rows), "a key has two rows"
    return found


def numbered(history: list[list[dict[str, Any]]]) -> list[tuple[int, list[dict[str, Any]]]]:
    return [(at, changes) for at, changes in enumerate(history, start=1) if changes]


@pytest.fixture(scope="module")
def memory() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("set timezone = 'UTC'")
        yield connection


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=histories(), data=st.data())
def test_windows_applied_in_order_give_the_fold(memory, new_changes, history, data):
    expected, changes = Fold(), new_changes(TABLE)
    memory.execute("drop schema if exists app cascade")
    target = Tables(memory, database="memory", schema="app")
    transactions = numbered(history)
    while transactions:
        count = data.draw(st.integers(1, len(transactions)), label="transactions in the window")
        window, transactions = transactions[:count], transactions[count:]
        for at, each in window:
            for change in each:
                expected.apply(at, change)
        batch = changes.batch(window)
        # An app's log holds documents in no order within a group; identities decide.
        order = data.draw(st.permutations(range(len(batch))) | st.just(range(len(batch))), label="order")
        target.apply([ChangeBatch(batch.schema, batch.rows.take(pa.array(order)))])
        assert rows_of(memory, "memory.app.pair") == expected.seen


def with_texts(batch: ChangeBatch) -> ChangeBatch:
    """The same changes when the columns cannot hold key part 'b', longer texts and lists of two."""
    rows = batch.rows.to_pylist()
    for row in rows:
        texts = {}
        if row["part"] == "b":
            row["part"], texts["part"] = None, "b"
        if row["_old_key"] and row["_old_key"]["part"] == "b":
            row["_old_key"]["part"], texts["_old_key.part"] = None, "b"
        if len(row["left"] or "") > 1:
            texts["left"], row["left"] = row["left"], None
        if len(row["right"] or ()) > 1:
            texts["right"], row["right"] = json.dumps(row["right"]), None
        row["_as_text"] = texts or None
    return ChangeBatch.from_arrow(pa.RecordBatch.from_pylist(rows, schema=batch.rows.schema))


def rows_with_texts(connection) -> dict[Key, tuple[int, dict[str, Any]]]:
    present = {name for (name, *_) in connection.execute("describe memory.app.pair").fetchall()}
    number, part, commit, left, right = ('"number"', '"part"', '"_commit"', '"left"', '"right"')
    texts = [f'"_as_text_{name}"' if f"_as_text_{name}" in present else "null" for name in ("part", "left", "right")]
    select = f"select {number}, {part}, {commit}, {left}, {right}, {', '.join(texts)} from memory.app.pair"
    found = {}
    for number, part, commit, left, right, part_text, left_text, right_text in connection.execute(select).fetchall():
        assert all(value is None for value, text in ((part, part_text), (left, left_text), (right, right_text)) if text)
        key = (number, part or part_text)
        assert key not in found, "a key has two rows"
        found[key] = (
            commit,
            {
                "left": left if left_text is None else left_text,
                "right": right if right_text is None else json.loads(right_text),
            },
        )
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=histories(), data=st.data())
def test_values_that_their_columns_cannot_hold_are_folded_as_others_are(memory, new_changes, history, data):
    expected, changes = Fold(), new_changes(TABLE)
    memory.execute("drop schema if exists app cascade")
    target = Tables(memory, database="memory", schema="app")
    transactions = numbered(history)
    while transactions:
        count = data.draw(st.integers(1, len(transactions)), label="transactions in the window")
        window, transactions = transactions[:count], transactions[count:]
        for at, each in window:
            for change in each:
                expected.apply(at, change)
        target.apply([with_texts(changes.batch(window))])
        assert rows_with_texts(memory) == expected.seen


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=histories(), data=st.data())
def test_the_lake_is_the_fold_of_the_log_however_loads_fail(lake, new_changes, history, data):
    expected, changes = Fold(), new_changes(TABLE)
    schema = f"log_{lake.version()}"
    transactions = numbered(history)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SLICE_CHANGES", data.draw(st.sampled_from([1, 5, 500_000]), label="slice"))
        while transactions:
            count = data.draw(st.integers(1, len(transactions)), label="transactions in the group")
            group, transactions = transactions[:count], transactions[count:]
            changes.commit_all(group)
            for at, each in group:
                for change in each:
                    expected.apply(at, change)
            fate = data.draw(st.sampled_from(["wait", "load", "load.before_commit", "load.after_commit"]), label="load")
            if fate == "load":
                load(lake, changes.reader, log=schema)
                assert rows_of(lake.connection, f"lake.{schema}.pair") == expected.seen
            elif fate != "wait":
                with fail_at(fate, OSError("power")), pytest.raises(OSError, match="power"):
                    load(lake, changes.reader, log=schema)
        report = load(lake, changes.reader, log=schema)
    assert report.to_sequence == changes.reader.end().sequence
    if expected.seen:
        assert rows_of(lake.connection, f"lake.{schema}.pair") == expected.seen
