"""Reads committed records of single partitions: from an offset to an offset, or the ones at given offsets."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deltaworks.log.change_log import CorruptLogError, LogAwayError, OffsetRetiredError
from deltaworks.log.kafka.client import CALL_S, Client
from deltaworks.log.kafka.records import GroupRecord, decode_record

if TYPE_CHECKING:
    from confluent_kafka import Message

POLL_S = 0.05
BUFFERED_BYTES = 64 << 20
"""What may wait of partitions that are ahead of the one whose record is needed next."""


class Session:
    """One consumer, for one thread at a time."""

    def __init__(self, client: Client) -> None:
        import confluent_kafka  # noqa: PLC0415

        self._kafka = confluent_kafka
        self._client = client
        self._consumer = client.consumer()
        self._waiting: dict[int, deque[Message]] = {}
        self._bytes = 0
        self._paused: set[int] = set()

    def bounds(self, topic: str, partition: int, *, must_exist: bool = False) -> tuple[int, int] | None:
        """The oldest offset that is kept and the end of what is committed; `None` without such a topic."""
        place = self._kafka.TopicPartition(topic, partition)
        code = self._kafka.KafkaError
        unknown = code.UNKNOWN_TOPIC_OR_PART, code._UNKNOWN_TOPIC, code._UNKNOWN_PARTITION
        deadline = time.monotonic() + min(CALL_S, self._client.settings.patience_s)
        while True:
            try:
                return self._consumer.get_watermark_offsets(
                    place, timeout=max(0.1, deadline - time.monotonic()), cached=False
                )
            except self._kafka.KafkaException as error:
                is_unknown = error.args[0].code() in unknown
                if is_unknown and not must_exist:
                    return None
                # A leader that moved, or a topic that was just made, is known everywhere in a moment.
                if time.monotonic() > deadline or not (is_unknown or error.args[0].retriable() or self._moved(error)):
                    raise self._client.error(f"ask where topic {topic!r} ends", error.args[0]) from error
                time.sleep(POLL_S)

    def group_records(self, start: int, end: int) -> Iterator[GroupRecord]:
        """The committed records of the topic of groups with `start <= offset < end`, in order."""
        topic = self._client.groups
        if start >= end:
            return
        self._assign(topic, 0, start)
        try:
            while (message := self._next(topic)) is not None:
                offset = _offset(message)
                if offset >= end:
                    return
                yield decode_record(message.value() or b"", headers_of(message), offset=offset, where=repr(topic))
                # A transaction ends with a marker of its own, so nothing follows the last record but that.
                if offset + 2 >= end:
                    return
        finally:
            self.rest()

    def change_at(self, partition: int, offset: int) -> Message:
        """The record of the changes at an offset; asked for in growing order per partition it is a sequential read.

        Raises:
            OffsetRetiredError: it is no longer kept.
            CorruptLogError: it should be there and is not.
        """
        topic = self._client.changes
        if partition not in self._waiting:
            self._waiting[partition] = deque()
            self._consumer.incremental_assign([self._kafka.TopicPartition(topic, partition, offset)])
        waiting = self._waiting[partition]
        deadline = time.monotonic() + self._client.settings.patience_s
        while True:
            while waiting:
                message = waiting.popleft()
                self._bytes -= len(message)
                if _offset(message) == offset:
                    return message
                if _offset(message) > offset:
                    raise self._missing(topic, partition, offset)
            self._fetch(topic, partition, offset, deadline)

    def rest(self) -> None:
        """Forget what is assigned, so that the session can be used for something else."""
        self._waiting.clear()
        self._paused.clear()
        self._bytes = 0
        self._consumer.unassign()

    def close(self) -> None:
        """Leave the brokers."""
        self._consumer.close()

    def _assign(self, topic: str, partition: int, offset: int) -> None:
        self._consumer.assign([self._kafka.TopicPartition(topic, partition, offset)])

    def _next(self, topic: str) -> Message | None:
        """The next record of the only partition that is assigned; `None` at its end."""
        deadline = time.monotonic() + self._client.settings.patience_s
        while True:
            message = self._consumer.poll(POLL_S)
            if message is None:
                self._check(deadline, topic)
                continue
            error = message.error()
            if error is None:
                return message
            if error.code() == self._kafka.KafkaError._PARTITION_EOF:
                return None
            if error.code() in self._out_of_range:
                raise LogAwayError(f"cannot read topic {topic!r}: its oldest records were just retired; read again")
            self._tolerate(error, topic)

    def _fetch(self, topic: str, partition: int, offset: int, deadline: float) -> None:
        self._throttle(topic, partition)
        for message in self._consumer.consume(500, POLL_S):
            error = message.error()
            if error is None:
                self._waiting[_partition(message)].append(message)
                self._bytes += len(message)
            elif error.code() in self._out_of_range:
                raise self._missing(topic, partition, offset)
            elif error.code() == self._kafka.KafkaError._PARTITION_EOF:
                if message.partition() == partition and not self._waiting[partition] and _offset(message) > offset:
                    raise self._missing(topic, partition, offset)
            else:
                self._tolerate(error, topic)
        self._check(deadline, topic)

    def _throttle(self, topic: str, needed: int) -> None:
        """Let partitions that are far ahead wait for the one that is needed."""
        partitions = self._kafka.TopicPartition
        if self._bytes > BUFFERED_BYTES:
            ahead = {partition for partition, waiting in self._waiting.items() if waiting} - self._paused
            self._consumer.pause([partitions(topic, partition) for partition in ahead])
            self._paused |= ahead
        back = self._paused if self._bytes < BUFFERED_BYTES // 2 else self._paused & {needed}
        if back:
            self._consumer.resume([partitions(topic, partition) for partition in back])
            self._paused = self._paused - back

    def _missing(self, topic: str, partition: int, offset: int) -> Exception:
        bounds = self.bounds(topic, partition)
        if bounds is not None and offset < bounds[0]:
            return OffsetRetiredError(
                f"cannot read offset {offset} of topic {topic!r}, partition {partition}: the brokers keep records from "
                f"offset {bounds[0]} on; run `deltaworks dump SOURCE` and start what reads this log over, and raise "
                "the topic's retention.ms"
            )
        return CorruptLogError(
            f"cannot find offset {offset} of topic {topic!r}, partition {partition}, although it was durable: the "
            "topic was made anew or lost its tail; remove both topics of the log and dump the source again"
        )

    def _moved(self, error: Exception) -> bool:
        code = self._kafka.KafkaError
        moved = code.NOT_LEADER_FOR_PARTITION, code.LEADER_NOT_AVAILABLE, code.OFFSET_NOT_AVAILABLE
        return error.args[0].code() in moved

    def _check(self, deadline: float, topic: str) -> None:
        if time.monotonic() > deadline:
            raise LogAwayError(
                f"cannot read topic {topic!r} on Kafka at {self._client.settings.brokers!r}: no answer in "
                f"{self._client.settings.patience_s:g} s; nothing was lost, it is tried again"
            )

    def _tolerate(self, error: Any, topic: str) -> None:  # Any: KafkaError
        """The client reconnects by itself; only what it cannot get over is raised."""
        if error.fatal() or not (error.retriable() or error.code() in self._transient):
            raise self._client.error(f"read topic {topic!r}", error)

    @property
    def _out_of_range(self) -> tuple[int, ...]:
        return self._kafka.KafkaError._AUTO_OFFSET_RESET, self._kafka.KafkaError.OFFSET_OUT_OF_RANGE

    @property
    def _transient(self) -> tuple[int, ...]:
        code = self._kafka.KafkaError
        return code._TRANSPORT, code._ALL_BROKERS_DOWN, code._TIMED_OUT, code._RESOLVE


def _offset(message: Message) -> int:
    return message.offset() or 0  # of a record that was fetched; it has one


def _partition(message: Message) -> int:
    return message.partition() or 0  # of a record that was fetched; it has one


def headers_of(message: Message) -> list[tuple[str, bytes]]:
    """The headers of a record."""
    return [(name, value or b"") for name, value in message.headers() or ()]  # type: ignore[misc]
