"""Kinds of change logs by the name they have in `deltaworks.yaml`; a new one is one line here.

Nothing outside of this folder names a kind: it asks for the log of a source, or of an app that writes to the lake.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from deltaworks.config import Config, KafkaLogConfig, LocalLogConfig
from deltaworks.log.change_log import LogReader, LogUsage, LogWriter
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE, LocalLogReader, LocalLogWriter
from deltaworks.log.membership import Membership, SharesError
from deltaworks.log.retention import Retired, retire
from deltaworks.log.segment_file import usage
from deltaworks.log.takeover import take_over


class LogPlace(Protocol):
    """Where one log lives. Opens nothing before it is asked to; any number of readers, one writer."""

    def reader(self) -> LogReader:
        """A reader, also of a log that does not exist yet."""

    def writer(self) -> LogWriter:
        """Take the log; made when it does not exist yet.

        Raises:
            FencedError: another writer holds it.
        """

    def take_over(self) -> LogWriter:
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

    def usage(self) -> LogUsage | None:
        """What the log takes of this machine's disk; `None` where it is kept elsewhere."""

    def retire(self, *, read_up_to: dict[str, int]) -> Retired:
        """Remove what the settings do not keep; see `retention.retire`. Nothing where others see to that."""

    def holder(self) -> int | None:
        """The process on this machine that holds the log to write, `None` when none does."""


class LocalLog:
    """A log in a folder; the settings of `log: {kind: local}`."""

    def __init__(self, _: str, folder: Path, settings: LocalLogConfig) -> None:
        self.folder = folder
        self.settings = settings

    def reader(self) -> LocalLogReader:
        """See `LogPlace`."""
        return LocalLogReader(self.folder)

    def writer(self) -> LocalLogWriter:
        """See `LogPlace`."""
        return LocalLogWriter.open(self.folder)

    def take_over(self) -> LocalLogWriter:
        """See `LogPlace`."""
        take_over(self.folder)
        return self.writer()

    def join(self, group: str, *, shares: int) -> Membership:  # noqa: ARG002  # a part of the contract
        """See `LogPlace`."""
        raise SharesError(
            f"cannot share app {group!r}: its log is in the folder {str(self.folder)!r} of one machine, where one "
            "process does the work; leave `shares` out, or keep the log on Kafka"
        )

    def usage(self) -> LogUsage:
        """See `LogPlace`."""
        return usage(self.folder)

    def retire(self, *, read_up_to: dict[str, int]) -> Retired:
        """See `LogPlace`."""
        return retire(self.folder, self.settings, read_up_to=read_up_to, now=datetime.now(UTC))

    def holder(self) -> int | None:
        """See `LogPlace`."""
        return holder_of(self.folder / LOCK_FILE)


def _kafka(name: str, folder: Path, settings: KafkaLogConfig) -> LogPlace:
    from deltaworks.log.kafka.place import KafkaLog  # noqa: PLC0415  # an optional library

    return KafkaLog(name, folder, settings)


_KINDS: Mapping[str, Callable[[str, Path, Any], LogPlace]] = {  # Any: the model of that kind's settings
    "local": LocalLog,
    "kafka": _kafka,
}


def log_of(config: Config, name: str) -> LogPlace:
    """The log of a source, or of an app that writes to the lake; touches nothing yet."""
    settings = config.log_settings(name)
    return _KINDS[settings.kind](name, config.log_folder(name), settings)


def open_reader(config: Config, name: str) -> LogReader:
    """A reader of a log. See `LogPlace.reader`."""
    return log_of(config, name).reader()


def open_writer(config: Config, name: str) -> LogWriter:
    """The writer of a log. See `LogPlace.writer`."""
    return log_of(config, name).writer()


def holder(config: Config, name: str) -> int | None:
    """The process that writes a log. See `LogPlace.holder`."""
    return log_of(config, name).holder()
