"""What an app sees of values that a column's Arrow type cannot hold."""

import math
import sqlite3
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, TypedDict

import pyarrow as pa

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.process.app import App, Source
from deltaworks.process.fold import Fold, fold_rows, old_row_keys, row_keys
from deltaworks.process.rows import Rows
from deltaworks.schema import Column, TableName, TableSchema

TYPES: dict[str, pa.DataType] = {
    "id": pa.int32(),
    "until": pa.date32(),
    "seen_at": pa.timestamp("us", "UTC"),
    "amount": pa.decimal128(6, 2),
    "rate": pa.decimal128(6, 2),
    "grid": pa.list_(pa.int32()),
}


class Price(TypedDict):
    until: date
    seen_at: datetime
    amount: Decimal
    rate: float
    grid: list[int]


def schema(*key: str) -> TableSchema:
    return TableSchema(
        name=TableName("public", "price"),
        columns=tuple(Column(name=name, type=kind, source_type=str(kind)) for name, kind in TYPES.items()),
        key=key,
    )


def batch(table: TableSchema, *rows: dict[str, Any]) -> ChangeBatch:
    meta = {"_op": "c", "_commit": 1, "_txid": 1, "_committed_at": datetime(2026, 1, 1, tzinfo=UTC)}
    full = [meta | {"_ordinal": at} | row for at, row in enumerate(rows)]
    return ChangeBatch(table, pa.RecordBatch.from_pylist(full, schema=change_schema(table)))


def test_an_app_gets_the_text_where_the_declared_type_cannot_say_it() -> None:
    table = Source("studio").table("price", schema=Price)
    texts = {
        "until": "0044-03-15 BC",
        "seen_at": "infinity",
        "amount": "NaN",
        "rate": "NaN",
        "grid": "[0:1]={7,8}",
    }
    ordinary = {
        "until": date(2026, 1, 1),
        "seen_at": datetime(2026, 1, 1, tzinfo=UTC),
        "amount": Decimal("1.50"),
        "rate": Decimal("0.10"),
        "grid": [7, 8],
    }
    fold = Fold()
    changes = batch(schema("id"), {"id": 1, "_as_text": texts}, {"id": 2, **ordinary})
    fold_rows(fold, changes, table, key="id", stored={}, watched=())
    rows = Rows(sqlite3.connect(":memory:"), App("prices", key="id", sources=[table]))
    found = {key: rows.read(table, row[1:]) for key, row in fold.puts.items() if row is not None}
    odd = found[1]
    assert (odd["until"], odd["seen_at"], odd["grid"]) == (texts["until"], texts["seen_at"], texts["grid"])
    assert odd["amount"].is_nan()
    assert math.isnan(odd["rate"])
    assert found[2] == ordinary | {"rate": 0.1}


def test_keys_that_a_column_cannot_hold_are_keys_of_their_own() -> None:
    changes = batch(
        schema("id", "until"),
        {"id": 1, "_as_text": {"until": "infinity"}},
        {"id": 1, "_as_text": {"until": "-infinity"}},
        {
            "_op": "u",
            "id": 1,
            "until": date(2026, 1, 1),
            "_old_key": {"id": 1, "until": None},
            "_as_text": {"_old_key.until": "infinity"},
        },
    )
    keys, old_keys = row_keys(changes), old_row_keys(changes)
    assert len(set(keys)) == 3
    assert old_keys == [None, None, keys[0]]
