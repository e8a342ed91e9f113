"""Source transactions for consumers that are not ours: where each event is in its own, and the topic that tells of all.

    envelope     "transaction": {"id": "571:53195829", "total_order": 3, "data_collection_order": 1}
    topic        {"status": "BEGIN", "id": …, "ts_ms": …, "event_count": null, "data_collections": null}
                 {"status": "END", "id": …, "ts_ms": …, "event_count": 3, "data_collections": [{…}, …]}

As Debezium has it under `provide.transaction.metadata`: what counts are the events that were written, so a change of a
key counts twice and a tombstone not at all, and a table without a topic does not count. A row that a dump read is in
no transaction. A consumer that waits for as many events as an END says, has a transaction whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from deltaworks.log.kafka.debezium import Event, Row

BEGIN, END = "BEGIN", "END"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A transaction as far as its events were counted: of each table, in the order of their first."""

    id: str
    committed_ms: int
    by_table: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of its events."""
        return sum(self.by_table.values())

    def marker(self, status: str) -> Row:
        """What the topic of transactions says of it."""
        is_end = status == END
        tables = [{"data_collection": table, "event_count": count} for table, count in self.by_table.items()]
        return {
            "status": status,
            "id": self.id,
            "ts_ms": self.committed_ms,
            "event_count": self.total if is_end else None,
            "data_collections": tables if is_end else None,
        }


def number_events(events: Sequence[Event], *, begun: Counted | None, goes_on: bool) -> tuple[list[Row], Counted | None]:
    """Put into each event's envelope where it is in its transaction; the markers of the transactions, in order.

    `begun` is the transaction that goes on from the events before, `goes_on` says that the last one goes on after
    these; it is given back.
    """
    markers: list[Row] = []
    at = begun
    # Tables come one after the other; a transaction has them mixed.
    for event in sorted(events, key=lambda event: event.order):
        place = None if event.value is None else event.value["transaction"]
        if event.value is None or place is None:
            continue
        if at is None or at.id != place["id"]:
            if at is not None:
                markers.append(at.marker(END))
            at = Counted(id=place["id"], committed_ms=event.value["source"]["ts_ms"])
            markers.append(at.marker(BEGIN))
        count = at.by_table.get(event.table, 0) + 1
        at = Counted(id=at.id, committed_ms=at.committed_ms, by_table=at.by_table | {event.table: count})
        event.value["transaction"] = {
            "id": at.id,
            "total_order": at.total,
            "data_collection_order": count,
        }
    if at is not None and not goes_on:
        markers.append(at.marker(END))
        at = None
    return markers, at
