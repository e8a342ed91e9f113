"""A Kafka topic as a sink: one record for each document, keyed by its entity; no value says that it is gone.

    key      the key as text
    value    the document as JSON, or null
    headers  deltaworks-position, deltaworks-ordinal, deltaworks-committed-at

A topic keeps what it is sent, so a record that a crash repeats is in it twice, and nothing in the broker
refuses an old one: whoever reads it keeps, per key, the record of the largest (position, ordinal). Records of one
key are in one partition in the order they were sent. The producer is idempotent and waits for all replicas in sync.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from deltaworks.config import Config
from deltaworks.connection import KafkaConnection
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError, document_json
from deltaworks.process.sink import (
    Capabilities,
    Document,
    Refusal,
    Sink,
    SinkAwayError,
    SinkReader,
    StoredVersion,
    key_text,
)
from deltaworks.store.sinks.package import needed
from deltaworks.store.sinks.pending import PendingSink

if TYPE_CHECKING:
    from confluent_kafka import Message, Producer

POSITION, ORDINAL, COMMITTED_AT = "deltaworks-position", "deltaworks-ordinal", "deltaworks-committed-at"
_SILENT = logging.Logger("librdkafka")
"""librdkafka tells of every lost connection by itself; what matters of it is raised."""
_SILENT.addHandler(logging.NullHandler())
_REFUSED = frozenset({"MSG_SIZE_TOO_LARGE", "INVALID_RECORD"})
_FOR_GOOD = frozenset(
    {
        "TOPIC_AUTHORIZATION_FAILED",
        "CLUSTER_AUTHORIZATION_FAILED",
        "_AUTHENTICATION",
        "SASL_AUTHENTICATION_FAILED",
        "UNKNOWN_TOPIC_OR_PART",
        "_UNKNOWN_TOPIC",
        "POLICY_VIOLATION",
        "TOPIC_EXCEPTION",
        "INVALID_REPLICATION_FACTOR",
    }
)


class KafkaTopicError(TerminalError):
    """The cluster refuses what no other document would change: the account, its rights, or the topic."""


@dataclass(frozen=True, slots=True)
class KafkaTopic:
    """A topic as an app declares it; a `SinkSpec`. It is made, compacted, when it is not there.

    `connection` is a name under `connections:` in `deltaworks.yaml`, of kind `kafka`. Needs the extra `[kafka]`.

    >>> KafkaTopic("films", connection="bus").capabilities.is_versioned
    False
    """

    name: str
    connection: str = field(kw_only=True)

    @property
    def capabilities(self) -> Capabilities:
        """It keeps what it is sent; who reads it compares the versions. Compaction drops tombstones after a while."""
        return Capabilities(can_read_back=True)

    def open(self, *, app: str, key: str, config: Config) -> Sink:  # noqa: ARG002
        """Connect, and make the topic when it is not there.

        Raises:
            SinkAwayError: the cluster is not there now.
            KafkaTopicError: it refuses the account, or the topic may not be made.
        """
        connection = config.connection(self.connection, KafkaConnection)
        _make_topic(connection, self.name)
        return PendingSink(self.name, KafkaDelivery(connection, self.name))

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read the whole topic, and keep the largest version of each key; needs memory for all keys."""
        return KafkaTopicReader(config.connection(self.connection, KafkaConnection), self.name)


class KafkaDelivery:
    """Brings documents into the topic; a `Delivery`."""

    def __init__(self, connection: KafkaConnection, topic: str) -> None:
        self._connection = connection
        self._topic = topic
        self._producer: Producer | None = None

    def deliver(self, documents: Sequence[Document], *, up_to: Lsn) -> Sequence[Refusal]:  # noqa: ARG002
        """See `Delivery.deliver`; every record is acknowledged when this returns."""
        refusals: list[Refusal] = []
        faults: list[str] = []
        producer = self._producer = self._producer or _producer(self._connection)
        for document in documents:
            self._produce(producer, document, refusals, faults)
        producer.flush(self._connection.timeout_s + 5)
        if faults or len(producer):
            self.close()
            fault = faults[0] if faults else "no answer"
            if fault in _FOR_GOOD:
                raise KafkaTopicError(f"cannot write topic {self._topic!r}: {fault}; mend the topic or the rights")
            raise SinkAwayError(f"cannot write topic {self._topic!r} now: {fault}; it is tried again")
        return refusals

    def close(self) -> None:
        """See `Delivery.close`; what was not acknowledged is given up, and may be in the topic or not."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(0)
            self._producer = None

    def _produce(self, producer: "Producer", document: Document, refusals: list[Refusal], faults: list[str]) -> None:
        kafka = needed("confluent_kafka", extra="kafka")

        def judge(error: Any) -> None:
            if error.name() in _REFUSED:
                reason = f"the topic refuses it: {error.name()}"
                refusals.append(Refusal(key=document.key, version=document.version, reason=reason))
            else:
                faults.append(error.name())

        def delivered(error: Any, _: "Message") -> None:
            if error is not None:
                judge(error)

        try:
            value = None if document.body is None else document_json(document.body)
        except UnsupportedBodyError as error:
            refusals.append(Refusal(key=document.key, version=document.version, reason=str(error)))
            return
        while True:
            try:
                producer.produce(
                    self._topic,
                    key=key_text(document.key).encode(),
                    value=value,
                    headers=_headers(document),
                    on_delivery=delivered,
                )
                producer.poll(0)
                return
            except BufferError:
                # Its queue is full: let what is in it leave. A delivery that takes too long empties it too.
                producer.poll(0.1)
            except kafka.KafkaException as error:
                judge(error.args[0])
                return


class KafkaTopicReader:
    """A `SinkReader` of a topic: per key the largest version up to the end as of the call. Serves one thread."""

    def __init__(self, connection: KafkaConnection, topic: str) -> None:
        self._connection = connection
        self._topic = topic

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        newest: dict[str, StoredVersion] = {}
        for key, version, value in self._records():
            if key not in newest or newest[key].version <= version:
                newest[key] = StoredVersion(key=key, version=version, is_deleted=value is None)
        yield from newest.values()

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`; reads the topic once for all of them."""
        newest: dict[str, tuple[Version, bytes | None]] = {}
        wanted = set(keys)
        for key, version, value in self._records() if wanted else ():
            if key in wanted and (key not in newest or newest[key][0] <= version):
                newest[key] = (version, value)
        return {key: json.loads(value) for key, (_, value) in newest.items() if value is not None}

    def close(self) -> None:
        """Nothing is held between calls."""

    def _records(self) -> Iterator[tuple[str, Version, bytes | None]]:
        kafka = needed("confluent_kafka", extra="kafka")
        timeout_s = self._connection.timeout_s
        settings = {
            "group.id": str(uuid4()),
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            # The end of a partition is told only after this.
            "fetch.wait.max.ms": 10,
        }
        consumer = kafka.Consumer(_settings(self._connection) | settings, logger=_SILENT)
        try:
            topic = consumer.list_topics(self._topic, timeout=timeout_s).topics[self._topic]
            left = set(topic.partitions)
            consumer.assign([kafka.TopicPartition(self._topic, number, 0) for number in left])
            last_news = time.monotonic()
            while left:
                # It waits for that many or for the whole time, so the time is short.
                messages = consumer.consume(1_000, timeout=0.05)
                if messages:
                    last_news = time.monotonic()
                elif time.monotonic() - last_news > timeout_s:
                    raise SinkAwayError(f"no answer from topic {self._topic!r}; it is tried again")
                for message in messages:
                    error = message.error()
                    if error is None:
                        yield _record(message)
                    elif error.code() == kafka.KafkaError._PARTITION_EOF:
                        left.discard(message.partition())
                    else:
                        raise kafka.KafkaException(error)
        except kafka.KafkaException as error:
            raise _fault(error, self._topic) from error
        finally:
            consumer.close()


def _make_topic(connection: KafkaConnection, name: str) -> None:
    kafka = needed("confluent_kafka", extra="kafka")
    admin = needed("confluent_kafka.admin", extra="kafka")
    try:
        client = admin.AdminClient(_settings(connection), logger=_SILENT)
        if name in client.list_topics(timeout=connection.timeout_s).topics:
            return
        topic = admin.NewTopic(name, num_partitions=-1, replication_factor=-1, config={"cleanup.policy": "compact"})
        client.create_topics([topic], request_timeout=connection.timeout_s)[name].result()
    except kafka.KafkaException as error:
        # Another app may have made it at the same moment.
        if error.args[0].code() != kafka.KafkaError.TOPIC_ALREADY_EXISTS:
            raise _fault(error, name) from error


def _producer(connection: KafkaConnection) -> "Producer":
    kafka = needed("confluent_kafka", extra="kafka")
    ours = {
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        "delivery.timeout.ms": int(connection.timeout_s * 1000),
    }
    producer: Producer = kafka.Producer(_settings(connection) | ours, logger=_SILENT)
    return producer


def _settings(connection: KafkaConnection) -> dict[str, Any]:
    options = {name: value.get_secret_value() for name, value in connection.options.items()}
    return options | {"bootstrap.servers": connection.servers}


def _fault(error: Exception, topic: str) -> SinkAwayError | KafkaTopicError:
    name = error.args[0].name()
    if name in _FOR_GOOD:
        return KafkaTopicError(f"cannot use topic {topic!r}: {name}; mend the topic or the rights")
    return SinkAwayError(f"no answer from topic {topic!r}: {name}; it is tried again")


def _headers(document: Document) -> list[tuple[str, str | bytes | None]]:
    version = document.version
    return [
        (POSITION, str(version.position.value).encode()),
        (ORDINAL, str(version.ordinal).encode()),
        (COMMITTED_AT, document.committed_at.isoformat().encode()),
    ]


def _record(message: "Message") -> tuple[str, Version, bytes | None]:
    headers: dict[str, Any] = dict(message.headers() or [])
    version = Version(Lsn(0), 0)
    # A record that somebody else wrote has no version, and is older than any of ours.
    with suppress(KeyError, ValueError):
        version = Version(Lsn(int(headers[POSITION])), int(headers[ORDINAL]))
    key, value = message.key(), message.value()
    return (key.decode() if isinstance(key, bytes) else str(key or "")), version, value
