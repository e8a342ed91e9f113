"""A source's log on Kafka: its topics, and the folder with the writer's lock on this machine.

    <topics>.changes   the changes, partitioned by a hash of table and key        see `records`
    <topics>.groups    one partition: a record for each group says where its parts lie

A group is one Kafka transaction over both topics, and a run of partial groups is one, too: readers see
committed records only, so a group is visible wholly or not at all, and what was not ended is aborted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaworks.config import KafkaLogConfig
from deltaworks.log.archive.manifest import Archived
from deltaworks.log.archive.restore import NothingArchivedError, Restored
from deltaworks.log.archive.standing import SegmentPlace
from deltaworks.log.change_log import LogWriter
from deltaworks.log.holder import holder_of
from deltaworks.log.kafka.client import Client
from deltaworks.log.kafka.membership import KafkaMembership, read_shares
from deltaworks.log.kafka.reader import KafkaLogReader
from deltaworks.log.kafka.writer import KafkaLogWriter
from deltaworks.log.lock import LOCK_FILE, replace_lock
from deltaworks.log.membership import ShareStanding
from deltaworks.log.retention import Retired


class KafkaLog:
    """See `registry.LogPlace`; the settings of `log: {kind: kafka}`."""

    def __init__(self, name: str, folder: Path, settings: KafkaLogConfig) -> None:
        self._client = Client(settings, topics=settings.topics or f"deltaworks.{name}")
        self._folder = folder

    def reader(self) -> KafkaLogReader:
        """See `LogPlace`."""
        return KafkaLogReader(self._client)

    def near_reader(self) -> KafkaLogReader:
        """See `LogPlace`."""
        return self.reader()

    def writer(self, *, mends: bool = False) -> KafkaLogWriter:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`. A writer on another machine is not asked but fenced: the source's lease is what keeps two
        from wanting it.
        """
        return KafkaLogWriter.open(self._client, self._folder)

    def take_over(self, *, mends: bool = False) -> KafkaLogWriter:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`. The brokers fence the old writer's transactions."""
        replace_lock(self._folder)
        return self.writer()

    def join(self, group: str, *, shares: int) -> KafkaMembership:
        """See `LogPlace`. Kafka's own consumer group."""
        return KafkaMembership(self._client, group=group, shares=shares)

    def shares_of(self, group: str, *, shares: int) -> Mapping[int, ShareStanding]:
        """See `LogPlace`."""
        return read_shares(self._client, group=group, shares=shares)

    def mending(self, writer: LogWriter | None = None) -> None:  # a part of the contract
        """See `LogPlace`. The brokers mend a replica from the others."""

    def usage(self) -> None:
        """See `LogPlace`. The brokers keep it."""

    def retire(self, *, read_up_to: dict[str, int]) -> Retired:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`. The brokers do it, by the topics' `retention.ms`."""
        return Retired()

    def archive(self) -> Sequence[Archived]:
        """See `LogPlace`. There is none: what the brokers keep is kept."""
        return ()

    def check(self) -> None:
        """See `LogPlace`. The topics are looked at by every writer and reader when it begins."""

    def restore(self) -> Restored:
        """See `LogPlace`. There is no archive."""
        raise NothingArchivedError(
            f"cannot restore the log in topics {self._client.topics!r}: it has no archive; the brokers keep its copies"
        )

    def segment_places(self) -> Sequence[SegmentPlace]:
        """See `LogPlace`. The brokers know."""
        return ()

    def archived(self) -> None:
        """See `LogPlace`. What the brokers keep is kept."""

    def is_full(self) -> bool:
        """See `LogPlace`. A broker whose disk is full is one that does not answer, or refuses."""
        return False

    def holder(self) -> int | None:
        """See `LogPlace`."""
        return holder_of(self._folder / LOCK_FILE)
