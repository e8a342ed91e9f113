"""Changes as JSON in the envelope of Debezium's PostgreSQL connector, without schemas, for consumers that are not ours.

    key    {"id": 1}
    value  {"before": …, "after": …, "source": {…}, "op": "u", "ts_ms": …, "transaction": {…}}

As there, a delete is followed by a tombstone (no value), a change of the key is a delete of the old one and a create
of the new one, and a text that the source did not send is `__debezium_unavailable_value`. Values: decimals as
text (`decimal.handling.mode=string`), dates as days, times and timestamps as microseconds since the epoch, timestamps
with a zone as ISO 8601 in UTC, bytes in base64, what has no Arrow type as the source's text.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from deltaworks.change import BEFORE, CREATE, DELETE, READ, TRUNCATE, ChangeBatch

UNAVAILABLE = "__debezium_unavailable_value"
_EPOCH_DAY = date(1970, 1, 1)
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001  # of timestamps without a zone

Row = dict[str, Any]  # Any: the values of a row


@dataclass(slots=True)
class Event:
    """A record of a table: key and envelope, nothing in a tombstone; `order` is its place at the source."""

    table: str
    order: tuple[int, int]
    key: Row
    value: Row | None

    def encoded(self) -> tuple[bytes | None, bytes | None]:
        """Key and value of the record."""
        return _json(self.key) if self.key else None, None if self.value is None else _json(self.value)


def events_of(batch: ChangeBatch, *, source: str) -> Iterator[Event]:
    """The records of a batch in order, without their places in a transaction; see `transactions`."""
    names, key, table = batch.schema.names, batch.schema.key, str(batch.schema.name)
    for row in batch.rows.to_pylist():
        as_text = dict(row["_as_text"] or ())
        after = {name: as_text.get(name, row[name]) for name in names} | dict.fromkeys(
            row["_unchanged"] or (), UNAVAILABLE
        )
        before = _before(row, as_text)
        op, order = row["_op"], (row["_commit"], row["_ordinal"])
        whole = _envelope(batch, row, source)
        if op == TRUNCATE:
            yield Event(table, order, {}, whole)
            continue
        new_key = {name: after[name] for name in key}
        if op == DELETE:
            yield Event(table, order, new_key, whole | {"before": before or new_key})
            yield from _tombstone(table, order, new_key)
            continue
        if row["_old_key"] is not None:
            old_key = {name: as_text.get(f"_old_key.{name}", value) for name, value in row["_old_key"].items()}
            yield Event(table, order, old_key, whole | {"op": DELETE, "before": before or old_key})
            yield from _tombstone(table, order, old_key)
            op, before = CREATE, None
        yield Event(table, order, new_key, whole | {"op": op, "before": before, "after": after})


def encoded(value: Row) -> bytes:
    """A value as JSON."""
    return _json(value)


def _tombstone(table: str, order: tuple[int, int], key: Row) -> Iterator[Event]:
    if key:
        yield Event(table, order, key, None)


def _before(row: Row, as_text: Mapping[str, str]) -> Row | None:
    before = row.get(BEFORE)
    if before is None:
        return None
    return {name: as_text.get(f"{BEFORE}.{name}", value) for name, value in before.items()}


def _envelope(batch: ChangeBatch, row: Row, source: str) -> Row:
    committed_ms = int(row["_committed_at"].timestamp() * 1000)
    is_read = row["_op"] == READ
    name = batch.schema.name
    return {
        "before": None,
        "after": None,
        "source": {
            "connector": "postgresql",
            "name": source,
            "ts_ms": committed_ms,
            "snapshot": "incremental" if is_read else "false",
            "schema": name.namespace,
            "table": name.name,
            "txId": None if is_read else row["_txid"],
            "lsn": row["_commit"],
            "sequence": str(row["_ordinal"]),
        },
        "op": row["_op"],
        "ts_ms": int(datetime.now(UTC).timestamp() * 1000),
        "transaction": None if is_read else {"id": f"{row['_txid']}:{row['_commit']}"},
    }


def _json(value: Row) -> bytes:
    return json.dumps(value, default=_plain, separators=(",", ":"), ensure_ascii=False).encode()


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime):
        if value.tzinfo is not None:
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        return (value - _EPOCH) // timedelta(microseconds=1)
    if isinstance(value, date):
        return (value - _EPOCH_DAY).days
    if isinstance(value, time):
        return ((value.hour * 60 + value.minute) * 60 + value.second) * 1_000_000 + value.microsecond
    if isinstance(value, timedelta):
        return value // timedelta(microseconds=1)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
