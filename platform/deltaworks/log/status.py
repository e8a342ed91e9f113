"""How far capture of a source is: its log compared with the source, per table, with the dumps and the slot.

Everything comes from the log's newest headers and one short question to the source, so asking disturbs nobody
and works whether or not a service runs. What the source does not answer is `None`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from deltaworks.capture.continuity import Gap
from deltaworks.capture.dump import DumpState
from deltaworks.capture.source import Source
from deltaworks.capture.status import SlotStatus, SourceStatus
from deltaworks.errors import DeltaworksError
from deltaworks.log.archive.standing import ArchiveStatus
from deltaworks.log.canary import Canary
from deltaworks.log.change_log import GroupHeader, LogReader
from deltaworks.position import Lsn
from deltaworks.schema import TableName

RATE_SPAN = timedelta(minutes=1)
"""Rates are over the last minute."""

MOST_HEADERS = 5_000
"""Headers looked at; on a log with more groups in a minute the rates are over fewer seconds."""

PATIENCE_S = 2.0
"""How long a source may take to answer before its row says that it does not."""

_SHORTEST_SPAN_S = 1.0

FIRST_DUMP = ""
"""The id of the dump that every captured table gets without being asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDumpStatus:
    """How far a dump of a table is: one that is under way, else the first one, whose id is empty.

    `rows` were given out. `estimated_rows` is by the source's statistics; `eta_s` is at the pace of the last minute,
    0 once it is done and `None` while nothing can be said.
    """

    id: str
    state: str
    rows: int
    estimated_rows: int | None
    rows_per_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStatus:
    """A captured table. `position` and `committed_at` are those of the newest group that changed it.

    They are `None` when it was in none of the groups looked at.
    """

    table: str
    position: Lsn | None
    committed_at: datetime | None
    changes_per_s: float
    dump: TableDumpStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryStatus:
    """The newest canary that came through: written `age_s` ago, it took `took_s` from the source into the log.

    `is_overdue` says that a service runs and the next ones did not come through within `limit_s`: it is not idle, it is
    stuck.
    """

    position: Lsn
    age_s: float
    took_s: float
    limit_s: float
    is_overdue: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStatus:
    """A source and its log at one moment.

    `service` is the process that writes the log, `None` when nobody does. `source_position` is where the source's
    own log ends; `lag_bytes` of it are not in ours, other databases' and tables' included. `lag_s`: nothing
    committed longer ago than that is missing; `None` when the source does not answer, and `unreachable` says why.
    `gaps` are changes that were missed and not dumped again yet. `archive` is `None` for a log that has none,
    `canary` where none ever came through. `is_full` says that the log's disk has no room, so the source waits.
    """

    source: str
    service: int | None
    position: Lsn
    changes: int
    transactions: int
    committed_at: datetime | None
    appended_at: datetime | None
    changes_per_s: float
    source_position: Lsn | None = None
    lag_bytes: int | None = None
    lag_s: float | None = None
    slot: SlotStatus | None = None
    unreachable: str | None = None
    gaps: Sequence[str] = ()
    archive: ArchiveStatus | None = None
    canary: CanaryStatus | None = None
    is_full: bool = False
    tables: Sequence[TableStatus] = ()

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """All of it as JSON values: positions as the source writes them, times in ISO 8601."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def read_status(
    source: Source,
    reader: LogReader,
    *,
    tables: Sequence[TableName],
    service: int | None,
    archive: ArchiveStatus | None = None,
    is_full: bool = False,
    patience_s: float = PATIENCE_S,
) -> CaptureStatus:
    """The status as of now. Never raises for a source that does not answer: the status says so."""
    asked: SourceStatus | None = None
    unreachable: str | None = None
    try:
        asked = source.status(timeout_s=patience_s)
    except DeltaworksError as error:
        unreachable = str(error)
    status = log_status(source.name, reader, tables=tables, service=service, asked=asked, unreachable=unreachable)
    return replace(status, archive=archive, is_full=is_full)


def log_status(
    name: str,
    reader: LogReader,
    *,
    tables: Sequence[TableName],
    service: int | None,
    asked: SourceStatus | None = None,
    unreachable: str | None = None,
) -> CaptureStatus:
    """The status with what the source answered, or of the log alone."""
    now = datetime.now(UTC)
    recent = _Recent.of(reader, now=now, tables=[str(table) for table in tables])
    last = recent.last
    end = reader.end()
    position = last.position if last is not None else end.position
    row_counts = {} if asked is None else asked.row_counts
    return CaptureStatus(
        source=name,
        service=service,
        position=position,
        changes=end.offset,
        transactions=end.chain.count,
        committed_at=recent.committed_at,
        appended_at=last.appended_at if last is not None else None,
        changes_per_s=sum(recent.changes.values()) / recent.span_s,
        source_position=asked.position if asked is not None else None,
        lag_bytes=max(0, asked.position.value - position.value) if asked is not None else None,
        lag_s=_lag_s(asked, last, now=now) if asked is not None else None,
        slot=asked.slot if asked is not None else None,
        unreachable=unreachable,
        gaps=[Gap.from_json(gap).summary for gap in end.progress.get("gaps", ())],
        canary=_canary(Canary.of(end.progress), now=now, is_written=service is not None),
        tables=[recent.table(table, estimated=row_counts.get(table)) for table in tables],
    )


def _canary(newest: Canary | None, *, now: datetime, is_written: bool) -> CanaryStatus | None:
    if newest is None:
        return None
    return CanaryStatus(
        position=newest.position,
        age_s=newest.age_s(now),
        took_s=newest.took_s,
        limit_s=newest.limit_s,
        is_overdue=is_written and newest.is_overdue(now),
    )


def _lag_s(asked: SourceStatus, last: GroupHeader | None, *, now: datetime) -> float | None:
    """An upper bound of how old a commit may be that the log does not have."""
    if last is None:
        return None
    if asked.position <= last.position:
        return 0.0
    if last.max_committed_at is None:
        # It only moved the position, so when it was written everything up to that place had been received.
        return max(0.0, (now - last.appended_at).total_seconds())
    return max(0.0, (asked.at - last.max_committed_at).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recent:
    """What the newest headers say."""

    last: GroupHeader | None
    committed_at: datetime | None
    span_s: float
    changes: Mapping[str, int]
    newest: Mapping[str, GroupHeader]
    progress: Mapping[str, Any]  # Any: JSON values
    progress_before: Mapping[str, Any]

    @classmethod
    def of(cls, reader: LogReader, *, now: datetime, tables: Sequence[str]) -> "_Recent":
        since = now - RATE_SPAN
        last = oldest = None
        committed_at = None
        changes: dict[str, int] = {}
        newest: dict[str, GroupHeader] = {}
        for looked_at, header in enumerate(reader.headers_backwards()):
            is_recent = header.appended_at >= since
            if looked_at >= MOST_HEADERS or not (is_recent or set(tables) - set(newest) or committed_at is None):
                break
            last = last or header
            committed_at = committed_at or header.max_committed_at
            for table, count in header.tables.items():
                newest.setdefault(table, header)
                if is_recent:
                    changes[table] = changes.get(table, 0) + count
            oldest = header if is_recent else oldest
        # A log that is younger than the span, or has more groups in it than are looked at, is judged by what there is.
        began_at = oldest.appended_at if oldest is not None and oldest.sequence == 0 else since
        if oldest is not None and last is not None and last.sequence - oldest.sequence >= MOST_HEADERS - 1:
            began_at = oldest.appended_at
        return cls(
            last=last,
            committed_at=committed_at,
            span_s=max(_SHORTEST_SPAN_S, (now - began_at).total_seconds()),
            changes=changes,
            newest=newest,
            progress=last.progress if last is not None else {},
            progress_before=oldest.progress if oldest is not None else {},
        )

    def table(self, table: TableName, *, estimated: int | None) -> TableStatus:
        name = str(table)
        header = self.newest.get(name)
        return TableStatus(
            table=name,
            position=header.position if header is not None else None,
            committed_at=header.max_committed_at if header is not None else None,
            changes_per_s=self.changes.get(name, 0) / self.span_s,
            dump=self._dump(name, estimated=estimated),
        )

    def _dump(self, table: str, *, estimated: int | None) -> TableDumpStatus | None:
        found = _cursors(self.progress, table)
        if not found:
            return None
        dump_id = next((each for each, cursor in found.items() if not _is_done(cursor)), next(iter(found)))
        cursor = found[dump_id]
        scanned = _scanned(cursor)
        rows_per_s = max(0, scanned - _scanned(_cursors(self.progress_before, table).get(dump_id, {}))) / self.span_s
        estimated_rows = cursor.get("estimated_rows") or estimated
        eta_s = 0.0 if _is_done(cursor) else None
        if eta_s is None and estimated_rows is not None and rows_per_s > 0:
            eta_s = max(0, estimated_rows - scanned) / rows_per_s
        return TableDumpStatus(
            id=dump_id,
            state=cursor["state"],
            rows=int(cursor["rows"]),
            estimated_rows=estimated_rows,
            rows_per_s=rows_per_s,
            eta_s=eta_s,
        )


Cursor = Mapping[str, Any]  # Any: JSON values


def _cursors(progress: Mapping[str, Any], table: str) -> dict[str, Cursor]:  # Any: JSON values
    """The cursors of a table by the dump's id: that of the first dump, then of those under way that were asked for."""
    initial = progress.get("dumps", {}).get(table)
    cursors: dict[str, Cursor] = {} if initial is None else {FIRST_DUMP: initial}
    for dump_id, asked in progress.get("asked", {}).items():
        if asked.get("ending") is None and table in asked["tables"]:
            cursors[dump_id] = asked["tables"][table]
    return cursors


def _is_done(cursor: Cursor) -> bool:
    return bool(cursor["state"] == DumpState.DONE.value)


def _scanned(cursor: Cursor) -> int:
    """Rows looked at; older progress has only those given out."""
    return int(cursor.get("scanned", cursor.get("rows", 0)))


def _plain(value: Any) -> Any:  # Any: whatever the fields of a status hold
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Lsn):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
