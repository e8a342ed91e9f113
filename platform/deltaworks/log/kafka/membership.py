"""Members of a group by Kafka's own protocol: shares are partitions of a topic that nobody writes to.

    <topics>.<group>.shares    one partition for each share; its committed offset is the next group of the log, with
                               what the member said of itself as the offset's metadata

The brokers give partitions to members, cooperatively: who keeps a share goes on while others move. They refuse a commit
of an older generation, so a member that was frozen past its session learns of it by its next `confirm`. A plain
`kafka-consumer-groups.sh --describe` shows who has what.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from deltaworks.errors import DeltaworksError
from deltaworks.log.kafka import topics
from deltaworks.log.kafka.client import CALL_S, MEMBER_PREFIX, Client
from deltaworks.log.membership import Leaving, MembershipLostError, Moved, SharesError, ShareStanding

if TYPE_CHECKING:
    from confluent_kafka import Consumer, TopicPartition

logger = structlog.get_logger(__name__)


def read_shares(client: Client, *, group: str, shares: int) -> dict[int, ShareStanding]:
    """See `LogPlace.shares_of`. Who asks takes no part in the group: nothing moves for it."""
    consumer = client.member(group=_group(client, group))
    try:
        found = _committed(client, consumer, _topic(client, group), range(shares))
    finally:
        consumer.close()
    holders = _holders(client, group)
    return {share: replace(standing, holder=holders.get(share)) for share, standing in found.items()}


def _holders(client: Client, group: str) -> dict[int, str]:
    """Who has which share, as the brokers say: a member that died has its shares until its time is up."""
    from confluent_kafka import KafkaError, KafkaException  # noqa: PLC0415

    name, topic = _group(client, group), _topic(client, group)
    # Kept until the answer is there: with the client goes whatever it has asked.
    admin = client.admin()
    with client.translated("ask who is in a group"):
        asked = admin.describe_consumer_groups([name], request_timeout=CALL_S)
        try:
            members = asked[name].result().members
        except KafkaException as error:
            if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
                raise
            members = []
    return {
        place.partition: member.client_id[len(MEMBER_PREFIX) :] if member.client_id.startswith(MEMBER_PREFIX) else ""
        for member in members
        for place in member.assignment.topic_partitions
        if place.topic == topic
    }


def _topic(client: Client, group: str) -> str:
    return f"{client.topics}.{group}.shares"


def _group(client: Client, group: str) -> str:
    return f"{client.topics}.{group}"


def _committed(client: Client, consumer: Consumer, topic: str, shares: Collection[int]) -> dict[int, ShareStanding]:
    from confluent_kafka import TopicPartition  # noqa: PLC0415

    with client.translated("ask how far a group is"):
        found = consumer.committed([TopicPartition(topic, share) for share in sorted(shares)], timeout=CALL_S)
    for place in found:
        if place.error is not None:
            raise client.error("ask how far a group is", place.error)
    # An offset that was never committed is a negative number.
    return {place.partition: ShareStanding(done=max(place.offset, 0) - 1, note=place.metadata or "") for place in found}


class KafkaMembership:
    """See `Membership`."""

    def __init__(self, client: Client, *, group: str, shares: int) -> None:
        """Join the group; the topic is made when it is missing.

        Raises:
            SharesError: the group has another number of shares.
            LogAwayError: the brokers do not answer.
        """
        import confluent_kafka  # noqa: PLC0415

        self._kafka = confluent_kafka
        self._client = client
        self._topic = _topic(client, group)
        self._note = ""
        self._count = shares
        self._given: set[int] = set()
        self._lost: set[int] = set()
        self._leaving: Leaving | None = None
        self._is_closed = False
        # A third is left for a confirm to be sent, and a third for what began right after it to end.
        self.lease_s = client.settings.member_timeout_s / 3
        topics.ensure(client, {self._topic: shares})
        found = topics.check(client, [self._topic]).partitions
        if found != shares:
            raise SharesError(
                f"cannot share app {group!r} in {shares}: its group has {found} shares; set shares to {found}, or stop "
                f"every member, remove topic {self._topic!r}, and have all of it processed again"
            )
        self._consumer: Consumer = client.member(group=_group(client, group))
        self._consumer.subscribe(
            [self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._are_lost
        )

    def poll(self, leaving: Leaving) -> Moved:
        """See `Membership`."""
        self._leaving = leaving
        with self._client.translated("take part in a group"):
            message = self._consumer.poll(0)
        if message is not None and (error := message.error()) is not None and error.fatal():
            raise self._client.error("take part in a group", error)
        given = self._committed(self._given) if self._given else {}
        moved = Moved(given={share: standing.done for share, standing in given.items()}, lost=frozenset(self._lost))
        self._given, self._lost = set(), set()
        return moved

    def confirm(self, done: Mapping[int, int], *, note: str = "") -> None:
        """See `Membership`. The brokers check the generation of this member."""
        if not done:
            return
        self._note = note
        offsets = [
            self._kafka.TopicPartition(self._topic, share, sequence + 1, note) for share, sequence in done.items()
        ]
        try:
            answered = self._consumer.commit(offsets=offsets, asynchronous=False)
        except self._kafka.KafkaException as error:
            raise self._unconfirmed(error.args[0]) from error
        for place in answered or ():
            if place.error is not None:
                raise self._unconfirmed(place.error)

    def progress(self) -> Mapping[int, int]:
        """See `Membership`."""
        return {share: standing.done for share, standing in self._committed(range(self._count)).items()}

    def close(self) -> None:
        """See `Membership`; shares are left as their last `confirm` said."""
        if not self._is_closed:
            self._is_closed = True
            self._leaving = None
            self._consumer.close()

    def _committed(self, shares: Collection[int]) -> dict[int, ShareStanding]:
        return _committed(self._client, self._consumer, self._topic, shares)

    def _unconfirmed(self, error: Any) -> MembershipLostError:  # Any: KafkaError
        return MembershipLostError(
            f"cannot say how far this member of {self._topic!r} is: {error.str()}; it takes part again, and who has "
            "its shares then goes on from what was said before"
        )

    # Called by the client library within `poll`.

    def _assigned(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        # Nothing is ever read from there; what counts is who has it.
        there = [self._kafka.TopicPartition(self._topic, each.partition, self._kafka.OFFSET_END) for each in places]
        consumer.incremental_assign(there)
        consumer.pause(there)
        self._given |= {place.partition for place in places}

    def _revoked(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        shares = {place.partition for place in places}
        self._given -= shares
        try:
            if self._leaving is not None:
                self.confirm(self._leaving(shares), note=self._note)
        except DeltaworksError as error:
            logger.warning("a share was left without a word", shares=sorted(shares), error=str(error))
        finally:
            consumer.incremental_unassign(places)

    def _are_lost(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        shares = {place.partition for place in places}
        self._given -= shares
        self._lost |= shares
        logger.warning("shares are lost", topic=self._topic, shares=sorted(shares))
        consumer.incremental_unassign(places)
