"""Looking into change logs: which there are, what a group holds, and what comes in."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log import find
from deltaworks.log.archive.standing import ArchiveStatus, SegmentPlace
from deltaworks.log.change_log import EMPTY_END, GroupHeader, LogEnd, LogReader, LogUsage, OffsetRetiredError
from deltaworks.log.registry import log_of, open_reader
from deltaworks.position import Lsn

LOOK_S = 1.0
"""How long following a log sleeps at most before it looks whether it is to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogListing:
    """One log. `usage` is `None` where it is not kept on this machine, `away` says why nothing is known of it."""

    name: str
    kind: str
    oldest: GroupHeader | None = None
    end: LogEnd = EMPTY_END
    usage: LogUsage | None = None
    writer: int | None = None
    archive: ArchiveStatus | None = None
    away: str | None = None

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """All of it, the same on every kind of log."""
        oldest = self.oldest
        return {
            "log": self.name,
            "kind": self.kind,
            "first_sequence": oldest.sequence if oldest else None,
            "sequence": self.end.sequence,
            "first_offset": oldest.offset if oldest else None,
            "next_offset": self.end.offset,
            "position": str(self.end.position),
            "segments": self.usage.segments if self.usage else None,
            "sealed_segments": self.usage.sealed if self.usage else None,
            "bytes": self.usage.bytes if self.usage else None,
            "plain_bytes": self.usage.plain_bytes if self.usage else None,
            "oldest_at": oldest.appended_at.isoformat() if oldest else None,
            "writer": self.writer,
            "archive": asdict(self.archive) if self.archive is not None else None,
            "away": self.away,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRows:
    """Rows of one table in a group, in the order of their changes: this is row data."""

    table: str
    rows: Sequence[Mapping[str, Any]]  # Any: values of the source


def list_logs(config: Config) -> Sequence[LogListing]:
    """The log of every source, and of every app that wrote to one."""
    listed = [_listing(config, name) for name in [*config.sources, *config.apps]]
    return [log for log in listed if log.name in config.sources or log.end.sequence >= 0]


def list_segments(config: Config, log: str) -> Sequence[SegmentPlace]:
    """Where each segment of a log lies, oldest first; empty for a log that brokers keep.

    Raises:
        ConfigError: no source or app has that name.
    """
    if log not in config.apps:
        config.source(log)
    return log_of(config, log).segment_places()


def find_group(
    config: Config,
    log: str,
    *,
    sequence: int | None = None,
    offset: int | None = None,
    position: Lsn | None = None,
    moment: datetime | None = None,
) -> GroupHeader:
    """The header of the group at a place of a log (see `log.find`); the last group where none is given.

    Raises:
        NoSuchGroupError: the log has no such group.
    """
    reader = reader_of(config, log)
    if sequence is not None:
        return find.at_sequence(reader, sequence)
    if offset is not None:
        return find.at_offset(reader, offset)
    if position is not None:
        return find.at_position(reader, position)
    if moment is not None:
        return find.at_time(reader, moment)
    return find.at_sequence(reader, reader.end().sequence)


def group_rows(config: Config, log: str, sequence: int) -> Sequence[TableRows]:
    """The changes of one group, with their rows: this is row data.

    Raises:
        OffsetRetiredError: the group is no longer kept.
    """
    groups = islice(reader_of(config, log).read(after_sequence=sequence - 1, max_changes=1), 1)
    batches = [batch for group in groups for batch in group.batches]
    return [TableRows(table=str(batch.schema.name), rows=batch.rows.to_pylist()) for batch in batches]


def newest_groups(
    config: Config, log: str, *, count: int, follow: threading.Event | None = None
) -> Iterator[GroupHeader]:
    """The newest `count` headers, the oldest of them first; with `follow`, then each new one until that is set."""
    reader = reader_of(config, log)
    headers = list(islice(reader.headers_backwards(), count))
    yield from reversed(headers)
    last = headers[0].sequence if headers else reader.end().sequence
    while follow is not None and not follow.is_set():
        with suppress(RetryableError):
            if reader.wait(after_sequence=last, timeout_s=LOOK_S):
                new = _headers_after(reader, last)
                yield from new
                last = new[-1].sequence if new else last


def reader_of(config: Config, log: str) -> LogReader:
    """The reader of a log that has to be in the configuration.

    Raises:
        ConfigError: no source or app has that name.
    """
    if log not in config.apps:
        config.source(log)
    return open_reader(config, log)


def _headers_after(reader: LogReader, sequence: int) -> list[GroupHeader]:
    newer: list[GroupHeader] = []
    with suppress(OffsetRetiredError):
        for header in reader.headers_backwards():
            if header.sequence <= sequence:
                break
            newer.append(header)
    return newer[::-1]


def _listing(config: Config, name: str) -> LogListing:
    kind, log = config.log_settings(name).kind, log_of(config, name)
    try:
        reader = log.near_reader()
        end, oldest = reader.end(), reader.oldest()
    except RetryableError as error:
        return LogListing(name=name, kind=kind, away=str(error))
    return LogListing(
        name=name, kind=kind, oldest=oldest, end=end, usage=log.usage(), writer=log.holder(), archive=log.archived()
    )
