"""The writer of a log on Kafka: one transaction per group; see `place`.

    append:  begin ─► changes ─► every copy has them ─► the group's record ─► commit ─► return
    died at      1           2                      3                     4
    1-3  the next writer's start aborts the transaction; nobody saw any of it
    4    the brokers finish what they had begun to commit, or abort it; either way the next writer sees which

A commit whose answer is lost may have happened. So nothing is said of such a group before this writer, or the
next, has asked the brokers to settle the transaction and has read where the log ends.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog

from deltaworks import faults
from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.log.change_log import (
    CorruptLogError,
    FencedError,
    Group,
    GroupHeader,
    LogAwayError,
    LogEnd,
    LogFailedError,
)
from deltaworks.log.header import end_after, next_header
from deltaworks.log.kafka import topics
from deltaworks.log.kafka.client import Client
from deltaworks.log.kafka.debezium import encoded, events_of
from deltaworks.log.kafka.reader import KafkaLogReader
from deltaworks.log.kafka.records import (
    EPOCH,
    GROUP,
    GroupRecord,
    Headers,
    Piece,
    data_headers,
    encode_epoch,
    encode_group,
    pieces_of,
    record_headers,
)
from deltaworks.log.kafka.transactions import Counted, number_events
from deltaworks.log.lock import take_lock

if TYPE_CHECKING:
    from confluent_kafka import Producer

TOPICS_FILE = "topics.json"
"""In the log's folder: the ids of the topics that this machine wrote to. A topic of another id was made anew."""

PAUSE_S = 0.2

_Record = tuple[str, bytes | None, bytes | None]
"""A topic, a key and a value."""

logger = structlog.get_logger(__name__)


class RunInterruptedError(RetryableError):
    """The parts of a transaction that were appended are gone with its last one; capture goes on at the log's end."""


class OversizedRowError(LogFailedError):
    """A row does not fit a record in Debezium's envelope, which cannot be cut in parts."""


class KafkaLogWriter:
    """The one writer of a log; holds a lock on this machine, fences earlier writers on any. Serves one thread."""

    def __init__(
        self,
        client: Client,
        *,
        lock: int,
        partitions: int,
        producer: Producer,
        fatal: list[Any],  # Any: KafkaError
        reader: KafkaLogReader,
        last: GroupRecord,
    ) -> None:
        """Use `open`."""
        self.epoch = last.epoch
        self._client = client
        self._lock = lock
        self._partitions = partitions
        self._producer = producer
        self._fatal = fatal
        self._reader = reader
        self._log = last.log
        self._counts = list(last.counts)
        self._committed = reader.end()
        self._end = self._committed
        self._committed_counts = list(last.counts)
        self._in_transaction = False
        self._doubt: GroupHeader | None = None
        self._is_broken = False
        self._is_closed = False
        self._stopped: DeltaworksError | None = None
        self._foreign_topics: set[str] = set()
        self._foreign: Counted | None = None

    @classmethod
    def open(cls, client: Client, folder: Path) -> Self:
        """Take the log: check its topics, end the transaction of whoever wrote before, and raise the epoch durably.

        Raises:
            FencedError: another writer on this machine holds the log, or one elsewhere takes it at this moment.
            WeakTopicError: a topic can lose what it acknowledged.
            CorruptLogError: a topic was made anew.
            LogAwayError: the brokers do not answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        try:
            found = topics.ensure_topics(client)
            _check_ids(client, folder / TOPICS_FILE, found.ids)
            fatal: list[Any] = []  # Any: KafkaError
            producer = _initialised(client, fatal)
            reader = KafkaLogReader(client, must_exist=True)
            last = _raise_epoch(client, producer, reader, found)
            (folder / TOPICS_FILE).write_text(json.dumps(found.ids))
            return cls(
                client, lock=lock, partitions=found.partitions, producer=producer, fatal=fatal, reader=reader, last=last
            )
        except BaseException:
            os.close(lock)
            raise

    def end(self) -> LogEnd:
        """The end after the last append of this writer."""
        return self._end

    def append(self, group: Group) -> GroupHeader:
        """See `LogWriter.append`. Waits for brokers that are away, up to `patience_s`.

        Raises:
            RunInterruptedError: brokers were away in the middle of a run of partial groups.
            OversizedRowError: a row does not fit a record in Debezium's envelope.
        """
        deadline = time.monotonic() + self._client.settings.patience_s
        while True:
            self._check_may_write()
            try:
                if self._is_broken and (stored := self._settle(group)) is not None:
                    return stored
                return self._append(group, deadline)
            except LogAwayError as error:
                if self._is_in_run():
                    self._forget_run()
                    raise RunInterruptedError(
                        f"cannot end a transaction in the log {self._client.topics!r}: {error}; capture goes on at "
                        "the log's end"
                    ) from error
                if time.monotonic() > deadline:
                    raise
                logger.warning("an append waits for brokers", log=self._client.topics, error=str(error))
                time.sleep(PAUSE_S)
            except (FencedError, LogFailedError) as error:
                self._stopped = error
                raise

    def discard_partial(self) -> None:
        """See `LogWriter.discard_partial`."""
        if self._is_in_run():
            self._check_may_write()
            self._forget_run()

    def close(self) -> None:
        """Let another writer in; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stopped = FencedError(
            f"cannot write the log {self._client.topics!r}: this writer was closed; open it again"
        )
        if self._in_transaction and not self._is_broken:
            self._abort()
        self._producer.purge()
        self._reader.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, group: Group, deadline: float) -> GroupHeader:
        header = next_header(group, end=self._end, epoch=self.epoch, appended_at=datetime.now(UTC))
        foreign_records, foreign = self._foreign_records(group)
        if not self._in_transaction:
            self._call("begin a transaction", self._producer.begin_transaction)
            self._in_transaction = True
        # Whatever happens from here on, only the brokers know what became of it.
        self._is_broken, self._doubt = True, header
        counts, pieces = self._send_changes(group, header, deadline)
        faults.reach("log.before_commit")
        sent = _Sent()
        value = encode_group(header, pieces=pieces, counts=counts)
        self._produce(sent, self._client.groups, value, partition=0, headers=record_headers(GROUP, self._log))
        for topic, key, body in foreign_records:
            self._produce(sent, topic, body, key=key)
        self._flush(sent, deadline)
        if not group.is_partial:
            left_s = max(1.0, deadline - time.monotonic())
            self._call("commit a group", lambda: self._producer.commit_transaction(left_s))
            self._in_transaction = False
            # The brokers answer once they have decided to commit; their marks that say so come a little later.
            self._reader.wait_committed(sent.offsets[0], deadline=deadline)
            faults.reach("log.after_commit")
        self._is_broken, self._doubt = False, None
        self._counts, self._end, self._foreign = counts, end_after(header), foreign
        if not group.is_partial:
            self._committed, self._committed_counts = self._end, counts
        return header

    def _send_changes(self, group: Group, header: GroupHeader, deadline: float) -> tuple[list[int], list[list[int]]]:
        counts, sent = list(self._counts), _Sent()
        placed: list[tuple[Piece, list[int]]] = []
        for piece in pieces_of(group.batches, partitions=self._partitions):
            parts = piece.parts(self._client.settings.max_record_bytes)
            first = len(sent.offsets)
            for number, part in enumerate(parts):
                headers = data_headers(
                    piece,
                    sequence=header.sequence,
                    part=number,
                    of=len(parts),
                    epoch=self.epoch,
                    dense=counts[piece.partition],
                )
                self._produce(sent, self._client.changes, bytes(part), partition=piece.partition, headers=headers)
                counts[piece.partition] += 1
            placed.append((piece, list(range(first, first + len(parts)))))
        self._flush(sent, deadline)
        return counts, [
            [piece.batch, piece.partition, *(sent.offsets[at] for at in places)] for piece, places in placed
        ]

    def _foreign_records(self, group: Group) -> tuple[list[_Record], Counted | None]:
        """What goes to consumers that are not ours, and the transaction of theirs that goes on after the group."""
        wanted, topics_name = self._client.settings.debezium, self._client.topics
        if not wanted:
            return [], None
        batches = [batch for batch in group.batches if wanted == "all" or str(batch.schema.name) in wanted]
        self._ensure_foreign_topics({f"{topics_name}.{batch.schema.name}" for batch in batches})
        events = [event for batch in batches for event in events_of(batch, source=topics_name)]
        markers, goes_on = number_events(events, begun=self._foreign, goes_on=group.is_partial)
        records = [(f"{topics_name}.{event.table}", *event.encoded()) for event in events]
        for topic, key, value in records:
            self._check_size(topic, len(value or b"") + len(key or b""))
        if self._client.settings.debezium_transactions:
            records += [(self._client.transactions, encoded({"id": each["id"]}), encoded(each)) for each in markers]
        return records, goes_on

    def _ensure_foreign_topics(self, names: set[str]) -> None:
        wanted = dict.fromkeys(names, self._partitions)
        if self._client.settings.debezium_transactions:
            # In one partition, so that transactions come in the order of their commits.
            wanted[self._client.transactions] = 1
        if new := wanted.keys() - self._foreign_topics:
            topics.ensure(self._client, {name: wanted[name] for name in sorted(new)})
            topics.check(self._client, sorted(new))
            self._foreign_topics |= new

    def _check_size(self, topic: str, size: int) -> None:
        if size > (limit := self._client.settings.max_record_bytes):
            raise OversizedRowError(
                f"cannot write a row of {topic.removeprefix(self._client.topics + '.')!r} in Debezium's envelope: it "
                f"has {size:,} bytes; raise max_record_bytes ({limit:,}) and the topic's max.message.bytes, or take "
                "the table out of `debezium`"
            )

    def _produce(
        self,
        sent: _Sent,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int = -1,
        headers: Headers = [],  # noqa: B006  # never changed
    ) -> None:
        at = len(sent.offsets)
        sent.offsets.append(-1)

        def delivered(error: Any, message: Any) -> None:  # Any: KafkaError and Message
            if error is not None:
                sent.error = sent.error or error
            else:
                sent.offsets[at] = message.offset()

        while True:
            try:
                self._call(
                    "write",
                    lambda: self._producer.produce(
                        topic, value, key=key, partition=partition, headers=headers, on_delivery=delivered
                    ),
                )
                return
            except BufferError:
                # The queue is full: records leave it as the brokers take them.
                with self._client.translated("write"):
                    self._producer.poll(0.05)
                self._check_sent(sent)

    def _flush(self, sent: _Sent, deadline: float) -> None:
        with self._client.translated("write"):
            left = self._producer.flush(max(0.1, deadline - time.monotonic()))
        self._check_sent(sent)
        if left:
            raise LogAwayError(
                f"cannot write the log {self._client.topics!r}: brokers at {self._client.settings.brokers!r} did not "
                f"take {left} records in {self._client.settings.patience_s:g} s; nothing was lost, it is tried again"
            )

    def _check_sent(self, sent: _Sent) -> None:
        for error in (*self._fatal, sent.error):
            if error is not None:
                raise self._client.error("write", error)

    def _settle(self, group: Group) -> GroupHeader | None:
        """Find out what became of the last append, and be able to write again.

        The header when the log ends with this very group.
        """
        # Looked at before the transaction is ended: that would fence a writer that took over.
        self._check_epoch(self._reader.last())
        self._producer.purge()
        self._fatal = []
        self._producer = _initialised(self._client, self._fatal)
        self._in_transaction = False
        last = self._reader.last()
        self._check_epoch(last)
        doubt, self._doubt, self._is_broken = self._doubt, None, False
        self._committed = self._end = self._reader.end()
        if last is not None:
            self._counts = self._committed_counts = list(last.counts)
        found = None if last is None else last.header
        if found is None or doubt is None or found.sequence != doubt.sequence:
            return None
        is_this = (found.position, found.previous_position) == (group.position, group.previous_position)
        return found if is_this else None

    def _check_epoch(self, last: GroupRecord | None) -> None:
        if last is None or last.epoch != self.epoch:
            newer = "none" if last is None else last.epoch
            raise FencedError(
                f"cannot write the log {self._client.topics!r} with epoch {self.epoch!r}: its epoch is now {newer!r}; "
                "stop this writer, another one has the log"
            )

    def _is_in_run(self) -> bool:
        return self._end.is_partial

    def _forget_run(self) -> None:
        self._end, self._counts, self._foreign = self._committed, list(self._committed_counts), None
        if self._in_transaction and not self._is_broken:
            self._abort()

    def _abort(self) -> None:
        """End the transaction; where that cannot be done now, the next append settles it."""
        try:
            self._call(
                "abort a transaction", lambda: self._producer.abort_transaction(self._client.settings.patience_s)
            )
            self._is_broken, self._doubt, self._in_transaction = False, None, False
        except DeltaworksError as error:
            logger.warning("a transaction is left to the brokers", log=self._client.topics, error=str(error))
            self._is_broken = True

    def _call(self, what: str, call: Callable[[], Any]) -> None:
        with self._client.translated(what):
            call()

    def _check_may_write(self) -> None:
        if self._stopped is not None:
            raise self._stopped


class _Sent:
    """Records on their way: the offset of each once it is known, and the first error."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.error: Any = None  # Any: KafkaError


def _initialised(client: Client, fatal: list[Any]) -> Producer:  # Any: KafkaError
    """A producer whose predecessors are fenced and whose transactions are ended; its fatal errors go to `fatal`."""
    producer = client.producer(lambda error: fatal.append(error) if error.fatal() else None)
    with client.translated("start transactions"):
        producer.init_transactions(client.settings.patience_s)
    return producer


def _raise_epoch(client: Client, producer: Producer, reader: KafkaLogReader, found: topics.Topics) -> GroupRecord:
    last = reader.last()
    if last is not None and len(last.counts) != found.partitions:
        raise CorruptLogError(
            f"cannot write the log {client.topics!r}: topic {client.changes!r} has {found.partitions} partitions and "
            f"had {len(last.counts)}; another number breaks the order of keys: remove both topics and dump the source"
        )
    epoch = 1 if last is None else last.epoch + 1
    log = uuid.uuid4().hex if last is None else last.log
    counts = [0] * found.partitions if last is None else list(last.counts)
    placed: list[int] = []
    with client.translated("open the log"):
        producer.begin_transaction()
        producer.produce(
            client.groups,
            encode_epoch(epoch=epoch, counts=counts, topics=found.ids),
            partition=0,
            headers=record_headers(EPOCH, log),
            on_delivery=lambda _, message: placed.append(message.offset() or 0),
        )
        producer.commit_transaction(client.settings.patience_s)
    reader.wait_committed(placed[0], deadline=time.monotonic() + client.settings.patience_s)
    now = reader.last()
    if now is None or (now.epoch, now.log) != (epoch, log):
        raise FencedError(f"cannot open the log {client.topics!r}: another writer takes it at this moment")
    return now


def _check_ids(client: Client, file: Path, ids: Mapping[str, str]) -> None:
    if not file.exists():
        return
    before = json.loads(file.read_text())
    anew = sorted(name for name, topic_id in ids.items() if before.get(name, topic_id) != topic_id)
    if anew:
        raise CorruptLogError(
            f"cannot write the log {client.topics!r}: {', '.join(anew)} was made anew, what it held is gone; remove "
            f"both topics and {str(file)!r}, start what reads this log over, and dump the source"
        )
