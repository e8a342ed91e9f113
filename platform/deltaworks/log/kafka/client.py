"""librdkafka's clients with the settings a log needs, and its errors in our words.

librdkafka itself reconnects and retries; what it gives up on is said here to be one of: the brokers are away
(retryable), a newer writer took over (fenced), or something a person must mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deltaworks.config import KafkaLogConfig
from deltaworks.errors import TerminalError
from deltaworks.log.change_log import FencedError, LogAwayError, LogFailedError
from deltaworks.log.membership import member_name

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Producer
    from confluent_kafka.admin import AdminClient

TRANSACTION_MS = 900_000
"""How long a transaction may be open: the brokers' own limit unless it was changed. It bounds the time that one
source transaction, however large, may take to be written; a writer that starts ends its predecessor's at once."""

CALL_S = 10.0
"""How long one question to the brokers may take."""

MEMBER_PREFIX = "deltaworks-"
"""What the name of a member begins with among all clients of the brokers."""


class KafkaMissingError(TerminalError):
    """The client library of Kafka is not installed."""


class Client:
    """What reaches one log's topics. Connects to nothing by itself."""

    def __init__(self, settings: KafkaLogConfig, *, topics: str) -> None:
        self.settings = settings
        self.topics = topics
        self.changes = f"{topics}.changes"
        self.groups = f"{topics}.groups"
        self.transactions = f"{topics}.transaction"

    def producer(self, on_error: Callable[[Any], None]) -> Producer:  # Any: KafkaError
        """A producer of transactions under the log's own id, so that a later one fences it.

        `on_error` is told, from within its calls, of everything that goes wrong, fatal or not.
        """
        kafka = _library()
        patience_ms = int(self.settings.patience_s * 1000)
        return kafka.Producer(  # type: ignore[no-any-return]
            self._common()
            | {
                "error_cb": on_error,
                "transactional.id": self.topics,
                "transaction.timeout.ms": TRANSACTION_MS,
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": patience_ms,
                "linger.ms": 2,
                "batch.size": 1_000_000,
                "message.max.bytes": self.settings.max_record_bytes + 100_000,
                "queue.buffering.max.kbytes": 262_144,
                "compression.type": self.settings.compression,
                # Java's own default, so that a table's JSON lies where a Java producer would have put it.
                "partitioner": "murmur2_random",
            }
        )

    def consumer(self) -> Consumer:
        """A consumer without a group, for partitions and offsets that it is told; sees committed records only."""
        kafka = _library()
        return kafka.Consumer(  # type: ignore[no-any-return]
            self._common()
            | {
                "group.id": f"{self.topics}.unused",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "allow.auto.create.topics": False,
                "check.crcs": True,
                # A broker answers one fetch at a time: an idle one must not hold up the first of another partition.
                "fetch.wait.max.ms": 50,
                "fetch.error.backoff.ms": 50,
                "queued.max.messages.kbytes": 32_768,
            }
        )

    def member(self, *, group: str) -> Consumer:
        """A consumer that takes part in a group and commits offsets when it is told to.

        The group knows it by the name of this process, unless the log's `client` settings have a `client.id`.
        """
        kafka = _library()
        session_ms = int(self.settings.member_timeout_s * 1000)
        return kafka.Consumer(  # type: ignore[no-any-return]
            self._common()
            | {
                "client.id": self.settings.client.get("client.id", f"{MEMBER_PREFIX}{member_name()}"),
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": session_ms,
                "heartbeat.interval.ms": session_ms // 5,
                "max.poll.interval.ms": max(300_000, session_ms),
                "allow.auto.create.topics": False,
            }
        )

    def admin(self) -> AdminClient:
        """What makes and describes topics."""
        _library()
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        return AdminClient(self._common())

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Raise what librdkafka raises as one of our errors."""
        kafka = _library()
        try:
            yield
        except kafka.KafkaException as error:
            raise self.error(what, error.args[0]) from error
        except SystemError as error:
            # confluent-kafka 2.x: when a fatal error is told beside delivery reports, its exception can get lost on the
            # way out. What became of the call is then found out as after any other lost answer.
            raise LogAwayError(
                f"cannot {what} on Kafka at {self.settings.brokers!r}: the client library did not say why; it is tried "
                "again"
            ) from error

    def error(self, what: str, error: Any) -> Exception:  # Any: KafkaError, of a library that may be missing
        """A `KafkaError` as one of ours."""
        code = _library().KafkaError
        where = f"{what} on Kafka at {self.settings.brokers!r}: {error.str()}"
        if error.code() in (code._FENCED, code.INVALID_PRODUCER_EPOCH, code.PRODUCER_FENCED):
            return FencedError(f"cannot {where}; stop this writer, another one has the log {self.topics!r}")
        if error.fatal():
            return LogFailedError(f"cannot {where}; start the writer again: it keeps every group that was durable")
        if error.code() in (
            code.TOPIC_AUTHORIZATION_FAILED,
            code.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
            code.CLUSTER_AUTHORIZATION_FAILED,
            code.GROUP_AUTHORIZATION_FAILED,
            code._AUTHENTICATION,
            code.SASL_AUTHENTICATION_FAILED,
            code.INVALID_TRANSACTION_TIMEOUT,
            code.MSG_SIZE_TOO_LARGE,
            code.INVALID_REPLICATION_FACTOR,
            code.POLICY_VIOLATION,
        ):
            return LogFailedError(f"cannot {where}; mend the access or the setting on the brokers, then start again")
        return LogAwayError(f"cannot {where}; nothing was lost, it is tried again")

    def _common(self) -> dict[str, Any]:  # Any: librdkafka's settings
        return {
            "bootstrap.servers": self.settings.brokers,
            "client.id": "deltaworks",
            "reconnect.backoff.max.ms": 1_000,
            "retry.backoff.ms": 10,
            "topic.metadata.refresh.interval.ms": 30_000,
            "socket.keepalive.enable": True,
            # Its own lines on stderr repeat what our errors say; errors still come through the calls.
            "log_level": 0,
            **self.settings.client,
        }


def _library() -> Any:  # Any: a module that may be missing
    try:
        import confluent_kafka  # noqa: PLC0415
    except ImportError as error:
        raise KafkaMissingError(
            "cannot use a log on Kafka: confluent-kafka is not installed; run `pip install deltaworks[kafka]`"
        ) from error
    return confluent_kafka
