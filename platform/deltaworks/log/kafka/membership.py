"""Members of a group by Kafka's own protocol: shares are partitions of a topic that nobody writes to.

    <topics>.<group>.shares    one partition for each share; its committed offset is the next group of the log

The brokers give partitions to members, cooperatively: who keeps a share goes on while others move. They refuse a commit
of an older generation, so a member that was frozen past its session learns of it by its next `confirm`. A plain
`kafka-consumer-groups.sh --describe` shows who has what.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from deltaworks.errors import DeltaworksError
from deltaworks.log.kafka import topics
from deltaworks.log.kafka.client import CALL_S, Client
from deltaworks.log.membership import Leaving, MembershipLostError, Moved, SharesError

if TYPE_CHECKING:
    from confluent_kafka import Consumer, TopicPartition

logger = structlog.get_logger(__name__)


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
        self._topic = f"{client.topics}.{group}.shares"
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
        self._consumer: Consumer = client.member(group=f"{client.topics}.{group}")
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
        moved = Moved(given=self._committed(self._given) if self._given else {}, lost=frozenset(self._lost))
        self._given, self._lost = set(), set()
        return moved

    def confirm(self, done: Mapping[int, int]) -> None:
        """See `Membership`. The brokers check the generation of this member."""
        if not done:
            return
        offsets = [self._kafka.TopicPartition(self._topic, share, sequence + 1) for share, sequence in done.items()]
        try:
            answered = self._consumer.commit(offsets=offsets, asynchronous=False)
        except self._kafka.KafkaException as error:
            raise self._unconfirmed(error.args[0]) from error
        for place in answered or ():
            if place.error is not None:
                raise self._unconfirmed(place.error)

    def progress(self) -> Mapping[int, int]:
        """See `Membership`."""
        return self._committed(range(self._count))

    def close(self) -> None:
        """See `Membership`; shares are left as their last `confirm` said."""
        if not self._is_closed:
            self._is_closed = True
            self._leaving = None
            self._consumer.close()

    def _committed(self, shares: Collection[int]) -> dict[int, int]:
        wanted = [self._kafka.TopicPartition(self._topic, share) for share in sorted(shares)]
        with self._client.translated("ask how far a group is"):
            found = self._consumer.committed(wanted, timeout=CALL_S)
        for place in found:
            if place.error is not None:
                raise self._client.error("ask how far a group is", place.error)
        # An offset that was never committed is a negative number.
        return {place.partition: max(place.offset, 0) - 1 for place in found}

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
                self.confirm(self._leaving(shares))
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
