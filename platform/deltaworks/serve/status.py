"""How far the index is behind the log: what `/api/status`, `/metrics` and the page's last line say."""

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from deltaworks.log.change_log import LogReader
from deltaworks.position import Lsn
from deltaworks.store.search import SearchReader

_MAX_GROUPS = 5_000
"""Headers looked at to count a lag; beyond that the lag is "at least" what was counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Index and log at one moment.

    `lag_changes` counts the changes in the log after the index's position; `lag_s` is how long the
    oldest of them has been in the log, 0 without any. `committed_at` is the commit time of the newest
    change in the index.
    """

    is_ready: bool
    document_count: int
    index_position: Lsn | None
    committed_at: datetime | None
    flushed_at: datetime | None
    log_position: Lsn
    log_changes: int
    lag_changes: int
    lag_s: float
    is_lag_at_least: bool


def read_status(search: SearchReader, log: LogReader) -> Status:
    """The status as of now; reads no changes and opens no lake."""
    # The index first: if it moves in between, the lag shown is too large for a moment, never too small.
    freshness = search.freshness()
    end = log.end()
    reached = freshness.position if freshness else None
    lag_changes, oldest, is_lag_at_least = _behind(log, reached)
    return Status(
        is_ready=freshness is not None,
        document_count=freshness.document_count if freshness else 0,
        index_position=reached,
        committed_at=freshness.committed_at if freshness else None,
        flushed_at=freshness.flushed_at if freshness else None,
        log_position=end.position,
        log_changes=end.offset,
        lag_changes=lag_changes,
        lag_s=max(0.0, (datetime.now(UTC) - oldest).total_seconds()) if oldest else 0.0,
        is_lag_at_least=is_lag_at_least,
    )


def _behind(log: LogReader, reached: Lsn | None) -> tuple[int, datetime | None, bool]:
    if reached is not None and log.end().position <= reached:
        return 0, None, False
    changes, oldest, looked_at = 0, None, 0
    for header in islice(log.headers_backwards(), _MAX_GROUPS):
        if reached is not None and header.position <= reached:
            break
        looked_at += 1
        if header.next_offset > header.offset:
            changes += header.next_offset - header.offset
            oldest = header.appended_at
    return changes, oldest, looked_at == _MAX_GROUPS
