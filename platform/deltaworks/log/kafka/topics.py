"""The topics of a log: made where they are missing, and refused where they can lose what they acknowledged."""

import time
from dataclasses import dataclass
from typing import Any

import structlog

from deltaworks.errors import TerminalError
from deltaworks.log.change_log import LogAwayError
from deltaworks.log.kafka.client import CALL_S, Client

logger = structlog.get_logger(__name__)


class WeakTopicError(TerminalError):
    """A topic can lose records that it acknowledged; the message lists every fault with what mends it."""


@dataclass(frozen=True, slots=True)
class Topics:
    """What the brokers say of a log's topics: their ids by name, and the partitions of the changes."""

    ids: dict[str, str]
    partitions: int


def ensure_topics(client: Client) -> Topics:
    """Make the log's two topics where they are missing, and check them.

    Raises:
        WeakTopicError: a topic can lose what it acknowledged.
        LogAwayError: the brokers do not answer.
    """
    ensure(client, {client.changes: client.settings.partitions, client.groups: 1})
    return check(client, [client.changes, client.groups])


def ensure(client: Client, wanted: dict[str, int]) -> None:
    """Make topics with these numbers of partitions where they are missing."""
    from confluent_kafka import KafkaError, KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # noqa: PLC0415

    admin, settings = client.admin(), client.settings
    with client.translated("list topics"):
        there = admin.list_topics(timeout=_patience_s(client)).topics
    copies = settings.replication_factor
    retention_ms = -1 if settings.retention_hours is None else int(settings.retention_hours * 3_600_000)
    config = {
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        "retention.bytes": "-1",
        "min.insync.replicas": str(max(1, copies - 1)),
        "unclean.leader.election.enable": "false",
        "max.message.bytes": str(settings.max_record_bytes + 100_000),
    }
    new = [
        NewTopic(name, num_partitions=count, replication_factor=copies, config=config)
        for name, count in wanted.items()
        if name not in there
    ]
    if not new:
        return
    for name, made in admin.create_topics(new, operation_timeout=CALL_S, request_timeout=CALL_S * 2).items():
        with client.translated(f"make topic {name!r}"):
            try:
                made.result()
            except KafkaException as error:
                # Another process made it at this moment; that it is as it should be is checked by whoever uses it.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
                continue
        logger.info("made a topic", topic=name, partitions=wanted[name], replication_factor=copies)


def check(client: Client, names: list[str]) -> Topics:
    """What there is to know of topics that can be trusted; others are refused, unless the settings allow them."""
    described, configs = _described(client, names)
    faults = [fault for name in names for fault in _faults(client, name, described[name], configs[name])]
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        if not client.settings.allow_weak_topics:
            raise WeakTopicError(
                f"cannot keep the log {client.topics!r} on topics that can lose it, {len(faults)} to mend "
                f"(or `allow_weak_topics: true` on a machine for development):\n{listing}"
            )
        logger.warning("the log's topics can lose what they acknowledged; allowed by a setting", faults=faults)
    return Topics({name: str(described[name].topic_id) for name in names}, len(described[names[0]].partitions))


def _described(client: Client, names: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Topics and their settings. Brokers hear of a new topic one after the other, so one may not know it yet."""
    deadline = time.monotonic() + CALL_S
    while True:
        try:
            return _describe(client, names)
        except LogAwayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _describe(client: Client, names: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    from confluent_kafka import TopicCollection  # noqa: PLC0415
    from confluent_kafka.admin import ConfigResource  # type: ignore[attr-defined]  # noqa: PLC0415

    admin = client.admin()
    _wait_for(client, admin, names)
    with client.translated("describe topics"):
        described = {
            name: asked.result()
            for name, asked in admin.describe_topics(TopicCollection(names), request_timeout=CALL_S).items()
        }
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
        configs = {
            resource.name: {entry.name: entry.value for entry in asked.result().values()}
            for resource, asked in admin.describe_configs(resources, request_timeout=CALL_S).items()
        }
    return described, configs


def _wait_for(client: Client, admin: Any, names: list[str]) -> None:  # Any: AdminClient
    """Wait until topics that were just made are known and led."""
    deadline = time.monotonic() + CALL_S
    while True:
        with client.translated("list topics"):
            there = admin.list_topics(timeout=_patience_s(client)).topics
        led = {
            name
            for name, topic in there.items()
            if topic.error is None and topic.partitions and all(part.leader >= 0 for part in topic.partitions.values())
        }
        if led.issuperset(names):
            return
        if time.monotonic() > deadline:
            raise LogAwayError(
                f"cannot use topics {sorted(set(names) - led)!r}: no broker leads all of their partitions; start the "
                "brokers that hold them, it is tried again"
            )
        time.sleep(0.1)


def _patience_s(client: Client) -> float:
    return min(CALL_S, client.settings.patience_s)


def _faults(client: Client, name: str, topic: Any, config: dict[str, str]) -> list[str]:  # Any: TopicDescription
    faults = []
    copies = min(len(partition.replicas) for partition in topic.partitions)
    if copies < 3:
        faults.append(f"{name}: replication factor {copies}, needs 3; reassign it with kafka-reassign-partitions.sh")
    alter = f"run `kafka-configs.sh --alter --topic {name} --add-config"
    if int(config["min.insync.replicas"]) < 2:
        faults.append(
            f"{name}: min.insync.replicas is {config['min.insync.replicas']}, needs 2; {alter} min.insync.replicas=2`"
        )
    if config["unclean.leader.election.enable"] != "false":
        faults.append(f"{name}: unclean leader election is on; {alter} unclean.leader.election.enable=false`")
    if "compact" in config["cleanup.policy"]:
        faults.append(f"{name}: it is compacted, which drops changes; {alter} cleanup.policy=delete`")
    if int(config["max.message.bytes"]) < client.settings.max_record_bytes + 1_000:
        faults.append(
            f"{name}: max.message.bytes is {config['max.message.bytes']}, less than max_record_bytes; "
            f"{alter} max.message.bytes={client.settings.max_record_bytes + 100_000}`"
        )
    return faults
