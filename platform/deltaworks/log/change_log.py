"""The contract of the change log.

The unit is the *group*: whole source transactions, appended together, durable together, read
together. Capture's own progress travels inside the group, so position, dump cursor and changes
are one atomic write and there is no second place to disagree with.

    offset   0        1200     1200        1450
             ├─ group ─┼─ group ┼── group ───┤        an offset counts changes; a group that only
             1200 ch.   0 ch.     250 ch.             moves the position has none
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from deltaworks.capture.proof import NO_TRANSACTION, Chain, Proof
from deltaworks.change import ChangeBatch
from deltaworks.errors import InvariantError, RetryableError, TerminalError
from deltaworks.position import START, Lsn


class LogFullError(RetryableError):
    """The disk took no more; the log stands at the last whole group and the source waits."""


class LogAwayError(RetryableError):
    """The servers that keep the log do not answer, or too few of them; the log stands and the source waits."""


class LogBusyError(RetryableError):
    """Another process seals, removes or mends segments of the log."""


class LogFailedError(TerminalError):
    """The disk refused a sync: what was written may be gone, so this writer must not go on."""


class LogNotWritableError(TerminalError):
    """The process may not write where the log is; nothing was written."""


class FencedError(TerminalError):
    """Another writer holds the log, or a newer one has written to it."""


class CorruptLogError(InvariantError):
    """A group that was durable cannot be read back; `sequence` is the first that cannot, where that is known."""

    def __init__(self, message: str, *, sequence: int | None = None) -> None:
        super().__init__(message)
        self.sequence = sequence


class LogFormatError(TerminalError):
    """What lies in the log's place was written by something else or by a newer version."""


class BrokenChainError(InvariantError):
    """A group to append does not follow the log's last group; nothing was written."""


class OffsetRetiredError(TerminalError):
    """The asked offset is older than what the log keeps; the message names the dump that mends it."""


class ArchivedSegmentGoneError(OffsetRetiredError):
    """Groups that are kept in the log's archive only are not there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Changes to append together.

    `position`: with this group, everything committed at or before it is in the log.
    `previous_position`: the `position` of the group before; a broken chain is a lost group.
    `transaction_count`: source transactions in this group.
    `progress`: capture's state after this group, JSON values only.
    `proof`: what the reader of the source vouches for in it, `None` from writers that read no source.
    `is_partial`: its one transaction goes on in the next group, under the position before it. Such a run is durable
    group by group and becomes visible with its last one; a run that was never ended is forgotten.
    """

    batches: tuple[ChangeBatch, ...]
    position: Lsn
    previous_position: Lsn = START
    transaction_count: int = 0
    progress: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof | None = None
    is_partial: bool = False

    @property
    def change_count(self) -> int:
        """Changes over all batches; may be 0."""
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHeader:
    """What is known of a stored group without reading its changes.

    `offset` is the first change's, `next_offset` one past the last; `sequence` counts groups from 0 and has no holes.
    `tables` maps a table's full name to its change count. The `txid` and `committed_at` bounds are
    over the streamed changes (not reads), `None` without any. `proof` is `None` in groups from before there was one.
    `lost` says of a named gap what became of its changes: the group has its place, its header where that could be
    read, and no changes any more. See `mending`.
    """

    sequence: int
    offset: int
    next_offset: int
    epoch: int
    position: Lsn
    previous_position: Lsn
    transaction_count: int
    tables: Mapping[str, int]
    min_txid: int | None
    max_txid: int | None
    max_committed_at: datetime | None
    appended_at: datetime
    progress: Mapping[str, Any]
    proof: Proof | None = None
    is_partial: bool = False
    lost: str | None = None

    @property
    def chain(self) -> Chain:
        """The chain that the next group goes on with; a new one after a group without a proof."""
        return NO_TRANSACTION if self.proof is None else self.proof.chain

    @property
    def known_chain(self) -> Chain | None:
        """`chain`, or `None` where that is lost with the group."""
        return None if self.lost is not None and self.proof is None else self.chain

    def may_follow(self, position: Lsn) -> bool:
        """Whether a reader that stands at a position may go on with it: where a run of lost groups had its bounds is
        not known, and the reader may have read some of them before.
        """
        return self.previous_position == position or (self.lost is not None and self.previous_position > position)

    @property
    def names_tables(self) -> bool:
        """Whether `tables` accounts for all of its changes; not so in a gap whose header could not be read."""
        return sum(self.tables.values()) == self.next_offset - self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """Where a stored group stands: what the index of a sealed segment has of its header."""

    sequence: int
    offset: int
    next_offset: int
    position: Lsn
    is_partial: bool
    max_committed_at: datetime | None
    appended_at: datetime


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group read back."""

    header: GroupHeader
    batches: tuple[ChangeBatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """Where the log ends: the next offset, the position reached, and capture's progress and chain there."""

    sequence: int
    offset: int
    position: Lsn
    epoch: int
    progress: Mapping[str, Any]
    chain: Chain = NO_TRANSACTION
    is_partial: bool = False
    """Whether the last group's transaction goes on in the next group; only the writer sees such an end."""


EMPTY_END = LogEnd(sequence=-1, offset=0, position=START, epoch=0, progress={})
"""The end of a log that nothing was appended to. `LogEnd.sequence` is that of the last group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogUsage:
    """What a log takes of this machine's disk. `plain_bytes` is what it would take if none of it were sealed."""

    segments: int
    bytes: int
    sealed: int = 0
    plain_bytes: int = 0


class LogReader(Protocol):
    """Reads one source's log; any number may read while one writes, in any process."""

    def end(self) -> LogEnd:
        """The end as of now; `EMPTY_END` for a log that does not exist yet."""

    def oldest(self) -> GroupHeader | None:
        """The header of the oldest group that is kept; `None` where there is none."""

    def read(self, *, after_sequence: int, max_changes: int | None = None) -> Iterator[StoredGroup]:
        """Groups with a larger sequence, in order, each whole, up to the end as of now.

        Stops early once `max_changes` were given (always after at least one group), even within a
        transaction that is too large for one group: `is_partial` says so of every group but its last.

        Raises:
            OffsetRetiredError: groups in between are no longer kept.
            CorruptLogError: a group fails its checksum or does not follow the one before, or the
                log ends before `after_sequence`: what was read once is no longer there.
        """

    def headers_backwards(self) -> Iterator[GroupHeader]:
        """Headers from the last group to the first; reads no changes."""

    def wait(self, *, after_sequence: int, timeout_s: float) -> bool:
        """Return when a group with a larger sequence exists (`True`) or time is up (`False`)."""


class LogWriter(Protocol):
    """The one writer of a source's log. Its epoch is larger than every earlier writer's."""

    epoch: int

    def end(self) -> LogEnd:
        """The end after the last append of this writer."""

    def append(self, group: Group) -> GroupHeader:
        """Append a group; durable when this returns, wholly absent if it raises.

        Raises:
            BrokenChainError: `group.previous_position` is not where the log ends.
            BrokenProofError: the group's changes are not as many as its proof says; nothing was written.
            LogFullError: no space; the same call may work later.
            LogAwayError: the servers that keep the log are away; the same call may work later.
            LogFailedError: the sync failed; this writer is dead.
            FencedError: a newer writer took over.
        """

    def discard_partial(self) -> None:
        """Forget the parts of a transaction whose last part was not appended; opening a writer does the same."""

    def close(self) -> None:
        """Let another writer in."""
