"""A reader of the log, for tests: the rows a table has after all changes, and the order they came in."""

import time
from collections.abc import Callable
from typing import Any

import psycopg
from servers.postgres import Database

from deltaworks.log.memory import MemoryLog

Row = dict[str, Any]
DEADLINE_S = 60.0


def replay(log: MemoryLog, table: str, key: str = "id") -> dict[Any, Row]:
    """The rows of a table as a reader of the log has them; checks the order on the way."""
    rows: dict[Any, Row] = {}
    newest: dict[Any, tuple[int, int]] = {}
    position = 0
    for group in log.reader().read(after_sequence=-1):
        assert group.header.previous_position.value == position
        position = group.header.position.value
        for batch in group.batches:
            if batch.schema.name.name != table:
                continue
            for row in batch.rows.to_pylist():
                assert row["_commit"] <= position
                if row["_op"] == "t":
                    rows.clear()
                    continue
                was_at = (row["_old_key"] or row)[key]
                for each in {was_at, row[key]}:
                    version = (row["_commit"], row["_ordinal"])
                    assert version >= newest.get(each, (0, 0)), f"key {each} went back"
                    newest[each] = version
                had = rows.pop(was_at, {})
                if row["_op"] != "d":
                    values = {name: row[name] for name in batch.schema.names}
                    rows[row[key]] = values | {name: had.get(name, "LOST") for name in row["_unchanged"] or ()}
    return rows


def table_of(database: Database, table: str, key: str = "id") -> dict[Any, Row]:
    with database.connect(row_factory=psycopg.rows.dict_row) as connection:
        return {row[key]: row for row in connection.execute(f"select * from {table}")}


def ops(log: MemoryLog) -> list[tuple[str, Any]]:
    return [
        (row["_op"], row["id"])
        for group in log.reader().read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
    ]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
