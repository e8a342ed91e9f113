"""The contract of a source: how committed changes and existing rows leave a database.

    check ──► tables ──► open(resume_after) ──► ChangeStream.next() … confirm()
                 └─────► chunk() + mark()   ──► settled by `capture.dump` at the mark

A source never writes to the tables it captures, takes no lock and pauses nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Protocol

import pyarrow as pa

from deltaworks.capture.continuity import SlotHealth, SourceLease
from deltaworks.capture.schema_change import Survey
from deltaworks.capture.snapshot import SourceSnapshot
from deltaworks.capture.status import SourceStatus
from deltaworks.change import ChangeBatch
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.position import Lsn
from deltaworks.schema import TableName, TableSchema


class SourceUnreachableError(RetryableError):
    """The server does not answer, or the connection broke; positions are kept."""


class StreamFormatError(SourceUnreachableError):
    """The stream has to be opened once more, in another form; the source remembers which."""


class UndecodableError(SourceUnreachableError):
    """The server stumbles over its own log. It may pass; where it does not, what follows can only be dumped."""


class SourceNotReadyError(TerminalError):
    """The server cannot be captured as it is; the message has all findings with their mends."""


class SlotInvalidatedError(TerminalError):
    """The server recycled log that was not captured yet: a named gap that needs a dump."""


class DumpBlockedError(RetryableError):
    """A table cannot be read now, while changes can: its dump rests, the stream goes on."""


class Severity(Enum):
    """What a finding means for capture."""

    ERROR = "error"
    """The source cannot be captured until it is mended."""
    WARNING = "warning"
    """Capture works; the finding says what may go wrong, or what is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing on the server to mend.

    `mend` is the statement or the setting that removes it, ready to paste.
    """

    what: str
    mend: str
    severity: Severity = Severity.ERROR


class Visibility(Protocol):
    """What a snapshot of the source sees, by transaction id."""

    @property
    def oldest_running(self) -> int:
        """Every transaction below this id had ended when the snapshot was taken."""

    def sees(self, txid: int, *, commit: int) -> bool | None:
        """Whether the effects of this (top-level, committed) transaction are in the snapshot.

        `commit` is its position (`Lsn.value`). `None` when the server cannot say so exactly.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Who is at work on the source now.

    A transaction may be in the source's log already and not be visible yet, for example while its
    commit waits for a synchronous standby. Every such transaction is one that `visible_in` does not
    see, and it began at or after `oldest_began_at`; `None` when nothing runs. Every transaction
    that had started has an id below `next_txid`; a snapshot alone cannot say that, because it
    knows only up to the newest one that has ended.
    """

    visible_in: Visibility
    next_txid: int
    oldest_began_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows of a key range, read in one snapshot.

    `rows` is as `schema.row_schema()` says, in key order of the source, and may be empty; `last_key` is the
    key after which the next chunk starts, `None` when the range is exhausted.

    `scanned` rows were looked at and `took_s` is how long that took; under a condition fewer are in `rows`.
    `absent` is like `rows`, and has nothing but keys: those that were asked for and have no row.
    """

    schema: TableSchema
    rows: pa.RecordBatch
    visible_in: Visibility
    last_key: tuple[str, ...] | None
    scanned: int = 0
    took_s: float = 0.0
    absent: pa.RecordBatch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A run of whole transactions out of the source's log, in commit order.

    `position`: everything committed at or before it is in this slice or an earlier one. A slice
    without batches only moves the position (keep-alives, transactions on other tables).
    `mark`: the id of the mark that ends this slice; a slice ends at the first mark it meets, so
    all changes before a mark are in slices up to and including the one that carries it.
    `mark_position`, `mark_committed_at`: the commit position of that mark, and its time.
    `is_awaited`: the server waits for this position to be confirmed, for example to shut down.
    `is_partial`: the transaction goes on in the next slice; nothing else is in this one, and `position`
    is still the one before it. Only a transaction too large for memory comes in such a run, and the
    slice that ends the run has the position behind it. It must become visible as a whole.
    """

    batches: tuple[ChangeBatch, ...] = ()
    position: Lsn
    transaction_count: int = 0
    mark: str | None = None
    mark_position: Lsn | None = None
    mark_committed_at: datetime | None = None
    is_awaited: bool = False
    is_partial: bool = False


class ChangeStream(Protocol):
    """Changes after a position, in commit order; at least once over reconnects, exactly once within one."""

    def next(self, *, timeout_s: float, max_changes: int = 16_384) -> Slice | None:
        """The next slice, or `None` when nothing arrived in time. Whole transactions, but see `Slice.is_partial`.

        Raises:
            SourceUnreachableError: the connection broke; open a new stream at the last durable position.
        """

    def confirm(self, position: Lsn) -> None:
        """Let the source forget what was committed at or before `position`.

        Call it only with what is durable downstream: the source may delete that part of its log.
        """


class Source(Protocol):
    """A database whose committed changes can be captured. One instance serves one thread."""

    name: str
    chunk_rows: int
    """Rows of a dump chunk at most."""
    chunk_s: float
    """How long reading a chunk may take; its rows follow from that."""
    repairs_gaps: bool
    """Whether a gap is repaired by a dump; otherwise capture stops at it."""
    slot_alarm_bytes: int
    """Log kept at the source for us beyond which an alarm is raised."""

    def check(self) -> Sequence[Finding]:
        """Everything missing on the server, all at once, then what is worth a warning; no errors when it is ready."""

    def least_role(self) -> str:
        """Statements that make a role which can do all that this contract needs and nothing more; no secret in them."""

    def prepare(self, *, with_slot: bool = True) -> None:
        """Create what capture needs and may create (publication, slot); a no-op when it is there.

        A slot that is missing although the log has a position is a gap: without `with_slot` none is made.

        Raises:
            SourceNotReadyError: `check` has errors that are not ours to mend.
        """

    def status(self, *, timeout_s: float) -> SourceStatus:
        """Where the source's own log is now and what it keeps for us, within about `timeout_s`.

        Touches neither the stream nor the other calls' connection, so any thread may ask.

        Raises:
            SourceUnreachableError: no answer in time.
            SourceNotReadyError: the login is refused.
        """

    def tables(self) -> Sequence[TableSchema]:
        """The captured tables as they are now, in configured order."""

    def survey(self) -> Survey:
        """What the catalog says of the source and its captured tables now; those that do not exist are left out."""

    def open(self, *, resume_after: Lsn, known: Survey | None = None) -> AbstractContextManager[ChangeStream]:
        """Start streaming what was committed after `resume_after` (exclusive).

        `known` is the last survey that was stored; the source's history must go on from it.

        Raises:
            SlotInvalidatedError: the source no longer has everything after that position.
        """

    def renew(self, *, after: Lsn) -> Lsn:
        """Begin anew at a position after `after`, and give it; what lies between is a gap.

        Raises:
            TerminalError: the source cannot get past `after`.
        """

    def health(self) -> SlotHealth | None:
        """How the source's bookmark of us is; `None` when there is none."""

    def lease(self) -> SourceLease:
        """Take the right to be the one reader, over all machines.

        Raises:
            LeaseHeldError: another reader has it and is alive.
            SourceUnreachableError: the source does not answer.
        """

    def current_position(self) -> Lsn:
        """A position at or after every change visible now: a stream that reached it has them all."""

    def last_key(self, table: TableName) -> tuple[str, ...] | None:
        """The largest key now, as text in key order; `None` for an empty table. Ends a dump on a busy table."""

    def chunk(
        self,
        table: TableName,
        *,
        after_key: tuple[str, ...] | None,
        up_to_key: tuple[str, ...],
        limit: int,
        where: str | None = None,
    ) -> Chunk:
        """Up to `limit` rows with `after_key < key <= up_to_key`; the database compares the keys.

        With `where`, a condition in the source's SQL, those of them that it holds for. A chunk of large rows
        ends early. `last_key`, `chunk`, `rows` and `estimated_rows` may be called in another thread than the
        rest, one at a time.

        Raises:
            DumpBlockedError: the table is locked, or a standby cannot be read now.
        """

    def rows(self, table: TableName, *, keys: Sequence[tuple[str, ...]]) -> Chunk:
        """The rows that have one of these keys (as text, in key order) now; `last_key` is `None`.

        Raises:
            DumpBlockedError: as `chunk`.
        """

    def interrupt(self) -> None:
        """End a read that another thread is at, with an error there."""

    def running(self) -> Running:
        """The transactions that run now: what a read may miss although the log has it."""

    def estimated_rows(self, table: TableName) -> int | None:
        """About how many rows a dump will read; `None` when the source cannot say cheaply."""

    def mark(self, mark_id: str) -> None:
        """Commit a marker into the source's log; it comes back as `Slice.mark`."""

    def snapshot(self) -> AbstractContextManager[SourceSnapshot]:
        """All captured tables as of one exact position; see `SnapshotSource`."""

    def has_uncaptured(self) -> bool:
        """Whether a stream would bring changes of the captured tables; `False` while another reader streams."""

    def close(self) -> None:
        """Let go of every connection; the next call opens what it needs again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedChange:
    """What the dump remembers of a change that has left: enough to settle a chunk row against it.

    `texts` are of values that their column cannot hold; those are `None` in `values`, and their texts in a key.
    """

    txid: int
    op: str
    key: tuple[Any, ...]
    old_key: tuple[Any, ...] | None
    values: dict[str, Any] = field(repr=False)
    texts: dict[str, str] = field(default_factory=dict, repr=False)
    unchanged: frozenset[str] = frozenset()
