"""How a source is: where its own log is by its own clock, and what it keeps for us. Asked without a stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from deltaworks.position import Lsn
from deltaworks.schema import TableName


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStatus:
    """The slot that keeps the source's log for us.

    `wal_status` is the server's word: `reserved` and `extended` are well, `unreserved` may be lost with the next
    checkpoint, `lost` is a gap. `kept_bytes` of log are kept for it; `safe_bytes` may be written before it is in
    danger, `None` without a limit. `unconfirmed_bytes` were written after what we confirmed. `invalidation` and
    `inactive_since` are known from version 17 on.
    """

    name: str
    is_active: bool
    wal_status: str | None
    kept_bytes: int | None
    safe_bytes: int | None
    unconfirmed_bytes: int | None
    invalidation: str | None = None
    inactive_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """A source at one moment: the end of its log, its clock then, and the slot, `None` where there is none.

    `row_counts` are its statistics' of the captured tables; a table without statistics is left out.
    """

    position: Lsn
    at: datetime
    slot: SlotStatus | None
    row_counts: Mapping[TableName, int] = field(default_factory=dict)
