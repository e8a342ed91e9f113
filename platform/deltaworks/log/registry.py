"""Kinds of change logs by the name they have in `deltaworks.yaml`; a new one is one line here.

Nothing outside of this folder names a kind: it asks for the log of a source, or of an app that writes to the lake.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from deltaworks.config import Config, KafkaLogConfig, LocalLogConfig
from deltaworks.errors import DeltaworksError
from deltaworks.log.archive.cache import ArchivedSegments
from deltaworks.log.archive.manifest import Archived
from deltaworks.log.archive.place import ArchivePlace, check_archive
from deltaworks.log.archive.restore import NothingArchivedError, Restored, restore_log
from deltaworks.log.archive.standing import ArchiveStatus, SegmentPlace, archive_status, note_fault, segment_places
from deltaworks.log.archive.upload import archive_log
from deltaworks.log.change_log import LogReader, LogUsage, LogWriter
from deltaworks.log.full_disk import is_full
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE, LocalLogReader, LocalLogWriter
from deltaworks.log.membership import Membership, SharesError, ShareStanding
from deltaworks.log.mending import LocalMending
from deltaworks.log.retention import Retired, retire
from deltaworks.log.segment_file import usage
from deltaworks.log.takeover import take_over


class LogPlace(Protocol):
    """Where one log lives. Opens nothing before it is asked to; any number of readers, one writer."""

    def reader(self) -> LogReader:
        """A reader, also of a log that does not exist yet."""

    def near_reader(self) -> LogReader:
        """A reader of what can be had at once: it fetches nothing from an archive. For looking at the newest groups."""

    def writer(self, *, mends: bool = False) -> LogWriter:
        """Take the log; made when it does not exist yet. With `mends`, damage at its end becomes a named gap.

        Raises:
            FencedError: another writer holds it.
            CorruptLogError: its end is damaged, and may not or cannot be mended.
        """

    def take_over(self, *, mends: bool = False) -> LogWriter:
        """Take the log from a writer that was cut off from its source and holds it still; that one writes no more.

        Raises:
            FencedError: another process takes it over at this moment.
        """

    def join(self, group: str, *, shares: int) -> Membership:
        """Become a member of a group that shares the work on this log.

        Raises:
            SharesError: this kind of log is not shared, or the group has another number of shares.
            LogAwayError: the servers that keep the log do not answer.
        """

    def shares_of(self, group: str, *, shares: int) -> Mapping[int, ShareStanding]:
        """How far every share of such a group is, for who is no member; empty for a kind of log that is not shared.

        Raises:
            LogAwayError: the servers that keep the log do not answer.
        """

    def mending(self, writer: LogWriter | None = None) -> LocalMending | None:
        """The damage to the log, mended by who has its writer; `None` where others see to that."""

    def usage(self) -> LogUsage | None:
        """What the log takes of this machine's disk; `None` where it is kept elsewhere."""

    def retire(self, *, read_up_to: dict[str, int]) -> Retired:
        """Remove what the settings do not keep; see `retention.retire`. Nothing where others see to that."""

    def archive(self) -> Sequence[Archived]:
        """Copy closed segments that are not in the log's archive there; what came there. Nothing where there is none.

        Raises:
            RetryableError: the archive is away; what was copied is safe, and the next call goes on.
            TerminalError: a person has to act. Either way `archived` says so from then on.
        """

    def check(self) -> None:
        """See that what keeps the log is as it has to be; asks it, and changes nothing of the log.

        Raises:
            DeltaworksError: what is wrong with it, and the next step.
        """

    def restore(self) -> Restored:
        """Make a log that was lost anew from its archive; see `archive.restore`.

        Raises:
            LogThereError: the log is there.
            NothingArchivedError: it has no archive, or the archive has nothing of it.
            DeltaworksError: what else `archive.restore` raises.
        """

    def archived(self) -> ArchiveStatus | None:
        """How the log's archive is, without asking it; `None` for a log that has none."""

    def is_full(self) -> bool:
        """Whether the disk of this machine that the log is on has no room for it: then its source waits."""

    def segment_places(self) -> Sequence[SegmentPlace]:
        """Where each segment lies, oldest first; empty where a log has none."""

    def holder(self) -> int | None:
        """The process on this machine that holds the log to write, `None` when none does."""


class LocalLog:
    """A log in a folder; the settings of `log: {kind: local}`."""

    def __init__(self, name: str, folder: Path, settings: LocalLogConfig, *, cache: Path) -> None:
        self.folder = folder
        self.settings = settings
        self.cache = cache
        self._archive = None if settings.archive is None else ArchivePlace.of(name, settings.archive)

    @property
    def _seal_level(self) -> int | None:
        return self.settings.seal_level if self.settings.seal else None

    def reader(self) -> LocalLogReader:
        """See `LogPlace`."""
        return LocalLogReader(self.folder, archive=self._archived())

    def _archived(self) -> ArchivedSegments | None:
        if self._archive is None or self.settings.archive is None:
            return None
        size = self.settings.archive.cache_bytes
        return ArchivedSegments(self.folder, self._archive, cache=self.cache, cache_bytes=size)

    def near_reader(self) -> LocalLogReader:
        """See `LogPlace`."""
        return LocalLogReader(self.folder)

    def writer(self, *, mends: bool = False) -> LocalLogWriter:
        """See `LogPlace`."""
        size, mend_end = self.settings.segment_bytes, self.mending().mend_end if mends else None
        return LocalLogWriter.open(self.folder, segment_bytes=size, seal_level=self._seal_level, mend_end=mend_end)

    def take_over(self, *, mends: bool = False) -> LocalLogWriter:
        """See `LogPlace`."""
        take_over(self.folder)
        return self.writer(mends=mends)

    def join(self, group: str, *, shares: int) -> Membership:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`."""
        raise SharesError(
            f"cannot share app {group!r}: its log is in the folder {str(self.folder)!r} of one machine, where one "
            "process does the work; leave `shares` out, or keep the log on Kafka"
        )

    def shares_of(self, group: str, *, shares: int) -> Mapping[int, ShareStanding]:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`."""
        return {}

    def mending(self, writer: LogWriter | None = None) -> LocalMending:
        """See `LogPlace`."""
        end_segment = writer.end_segment if isinstance(writer, LocalLogWriter) else None
        return LocalMending(self.folder, archive=self._archived(), end_segment=end_segment)

    def usage(self) -> LogUsage:
        """See `LogPlace`."""
        return usage(self.folder)

    def retire(self, *, read_up_to: dict[str, int]) -> Retired:
        """See `LogPlace`."""
        return retire(self.folder, self.settings, read_up_to=read_up_to, now=datetime.now(UTC))

    def archive(self) -> Sequence[Archived]:
        """See `LogPlace`."""
        if self._archive is None:
            return ()
        try:
            done = archive_log(self.folder, self._archive, seal_level=self._seal_level)
        except (DeltaworksError, OSError) as error:
            note_fault(self.folder, error)
            raise
        note_fault(self.folder, None)
        return done

    def check(self) -> None:
        """See `LogPlace`. Of a folder there is nothing to ask; of an archive, whether it takes and gives."""
        if self._archive is not None:
            check_archive(self._archive)

    def restore(self) -> Restored:
        """See `LogPlace`."""
        if self._archive is None:
            raise NothingArchivedError(
                f"cannot restore the log in {str(self.folder)!r}: it has no archive; set log.archive in "
                "deltaworks.yaml to where it was archived"
            )
        return restore_log(self.folder, self._archive)

    def is_full(self) -> bool:
        """See `LogPlace`."""
        return is_full(self.folder)

    def segment_places(self) -> Sequence[SegmentPlace]:
        """See `LogPlace`."""
        return segment_places(self.folder, self.cache)

    def archived(self) -> ArchiveStatus | None:
        """See `LogPlace`."""
        return None if self._archive is None else archive_status(self.folder, self._archive)

    def holder(self) -> int | None:
        """See `LogPlace`."""
        return holder_of(self.folder / LOCK_FILE)


def _kafka(name: str, folder: Path, settings: KafkaLogConfig, *, cache: Path) -> LogPlace:  # noqa: ARG001  # no archive
    from deltaworks.log.kafka.place import KafkaLog  # noqa: PLC0415  # an optional library

    return KafkaLog(name, folder, settings)


_KINDS: Mapping[str, Callable[..., LogPlace]] = {  # Any: the model of that kind's settings
    "local": LocalLog,
    "kafka": _kafka,
}


def log_of(config: Config, name: str) -> LogPlace:
    """The log of a source, or of an app that writes to the lake; touches nothing yet."""
    settings = config.log_settings(name)
    return _KINDS[settings.kind](name, config.log_folder(name), settings, cache=config.archive_cache_folder(name))


def open_reader(config: Config, name: str) -> LogReader:
    """A reader of a log. See `LogPlace.reader`."""
    return log_of(config, name).reader()


def open_writer(config: Config, name: str) -> LogWriter:
    """The writer of a log. See `LogPlace.writer`."""
    return log_of(config, name).writer()


def holder(config: Config, name: str) -> int | None:
    """The process that writes a log. See `LogPlace.holder`."""
    return log_of(config, name).holder()
