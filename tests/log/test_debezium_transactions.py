"""A plain consumer can put a source transaction together from topics of JSON and the topic of transactions."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Consumer
from servers.kafka import KafkaCluster

from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import Group
from deltaworks.log.kafka.debezium import events_of
from deltaworks.log.kafka.place import KafkaLog
from deltaworks.log.kafka.transactions import Counted, number_events
from deltaworks.position import Lsn
from deltaworks.testing.changes import Change, Feed, batches, create, delete, table_schema, update

INT, TEXT = (pa.int32(), "integer", False), (pa.string(), "text", False)
FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=INT)


def numbered(
    found: Sequence[ChangeBatch], *, begun: Counted | None = None, goes_on: bool = False
) -> tuple[list[Any], list[Any], Counted | None]:
    events = [event for batch in found for event in events_of(batch, source="s")]
    markers, rest = number_events(events, begun=begun, goes_on=goes_on)
    return [event.value and event.value["transaction"] for event in events], markers, rest


def test_events_of_several_tables_are_counted_in_the_order_of_the_source() -> None:
    changes: list[Change] = [
        create(FILM, film_id=1, title="a"),
        create(ROLE, role_id=1, film_id=1),
        delete(FILM, film_id=1),
    ]
    places, (begin, end), rest = numbered(batches(changes, position=10))
    orders = Counter((place["total_order"], place["data_collection_order"]) for place in places if place is not None)
    assert orders == Counter([(1, 1), (2, 1), (3, 2)])
    # The tombstone of the delete is no event.
    assert places.count(None) == 1
    assert (begin["status"], begin["event_count"], begin["data_collections"]) == ("BEGIN", None, None)
    assert end | {"status": "END", "id": begin["id"], "event_count": 3} == end
    assert end["data_collections"] == [
        {"data_collection": "public.film", "event_count": 2},
        {"data_collection": "public.role", "event_count": 1},
    ]
    assert rest is None


def test_a_transaction_in_several_groups_begins_and_ends_once() -> None:
    first, (begin,), begun = numbered(batches([create(FILM, film_id=1, title="a")], position=10), goes_on=True)
    second, (end,), rest = numbered(batches([create(FILM, film_id=2, title="b")], position=10), begun=begun)
    assert [place["total_order"] for place in [*first, *second]] == [1, 2]
    assert (begin["status"], end["status"], end["event_count"], rest) == ("BEGIN", "END", 2, None)
    # It may also end with a group that has nothing of these tables.
    assert numbered([], begun=begun)[1] == [begun.marker("END") if begun else None]


@pytest.mark.server
def test_a_plain_consumer_puts_transactions_together(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    settings = small_kafka.log_settings(debezium="all", debezium_transactions=True, topics="foreign.shop")
    with KafkaLog("shop", tmp_path, settings).writer() as writer:
        feed = Feed(writer)
        feed.commit(*(create(FILM, film_id=n, title="t") for n in range(20)), create(ROLE, role_id=1, film_id=1))
        # A run that is not ended is nothing to anyone, and its events do not count.
        end = writer.end().position
        lost = tuple(batches([create(FILM, film_id=99, title="lost")], position=99))
        writer.append(Group(batches=lost, position=end, previous_position=end, is_partial=True))
        writer.discard_partial()
        half = tuple(batches([update(FILM, film_id=1, title="half")], position=end.value + 10))
        rest = tuple(batches([update(ROLE, role_id=1, film_id=2)], position=end.value + 10))
        writer.append(Group(batches=half, position=end, previous_position=end, is_partial=True))
        writer.append(Group(batches=rest, position=Lsn(end.value + 10), previous_position=end))
        feed.commit_together([delete(FILM, film_id=1)], [delete(ROLE, role_id=1)])

    markers = [value for value, _ in consumed(small_kafka, "foreign.shop.transaction", count=8)]
    assert [marker["status"] for marker in markers] == ["BEGIN", "END"] * 4
    ended = {marker["id"]: marker for marker in markers if marker["status"] == "END"}
    wanted = [marker["event_count"] for marker in ended.values()]
    assert wanted == [21, 2, 1, 1]
    assert ended.keys() == {key["id"] for _, key in consumed(small_kafka, "foreign.shop.transaction", count=8)}

    # A consumer counts what it has of a transaction until it has as many events as its END says.
    found: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
    for table in ("public.film", "public.role"):
        count = sum(
            each["event_count"]
            for marker in ended.values()
            for each in marker["data_collections"]
            if each["data_collection"] == table
        )
        for value, _ in consumed(small_kafka, f"foreign.shop.{table}", count=count):
            place = value["transaction"]
            found[place["id"]].append((place["total_order"], table, place["data_collection_order"]))
    for id_, marker in ended.items():
        orders = sorted(found[id_])
        assert [total for total, _, _ in orders] == list(range(1, marker["event_count"] + 1))
        for each in marker["data_collections"]:
            of_table = [order for _, table, order in orders if table == each["data_collection"]]
            assert of_table == list(range(1, each["event_count"] + 1))


def consumed(cluster: KafkaCluster, topic: str, *, count: int) -> Iterator[tuple[Any, Any]]:
    """Values and keys of committed records, without tombstones."""
    group = f"{topic}.{time.monotonic_ns()}"
    consumer = Consumer({"bootstrap.servers": cluster.brokers, "group.id": group, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    deadline = time.monotonic() + 60
    while count:
        assert time.monotonic() < deadline, f"{count} records of {topic} did not come in 60 s"
        message = consumer.poll(0.2)
        if message is not None and message.error() is None and message.value() is not None:
            count -= 1
            yield json.loads(message.value() or b""), json.loads(message.key() or b"null")
    consumer.close()
