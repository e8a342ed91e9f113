"""Checks a change log against the proof that its reader wrote into it.

For every group the windows and the chain are computed again from the changes that are read, and compared with
what the group's header says the reader saw. So this finds what a checksum cannot: changes that were lost,
doubled or exchanged before they were written, or by a program that wrote the log anew.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deltaworks.capture.proof import (
    NO_CHANGES,
    NO_TRANSACTION,
    BrokenProofError,
    Chain,
    Proof,
    Window,
    WindowSet,
    minute_start,
)
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.position import START, Lsn

OnGroup = Callable[[int, int], None]
"""Called with the groups that were checked and those there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFault:
    """One thing in a group that is not as the reader saw it. `table` is `None` where the chain is broken."""

    sequence: int
    table: str | None = None
    minute: int | None = None
    what: str

    def __str__(self) -> str:
        minute = f", minute {minute_start(self.minute):%F %H:%M} UTC" if self.minute is not None else ""
        return f"group {self.sequence}{f', {self.table}' if self.table else ''}{minute}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogVerification:
    """A log that was read from the oldest group that is kept to `position`, its last one's.

    `lost` are named gaps, whose changes a damage took: told here, and no fault of the others.
    `unproven` groups have no proof: they are from before there was one, or from a writer that reads no source.
    `transactions` and `changes` are those of the groups that have one; `windows` sums them up.
    """

    groups: int = 0
    unproven: int = 0
    changes: int = 0
    transactions: int = 0
    position: Lsn = START
    windows: WindowSet = field(default_factory=WindowSet)
    faults: tuple[LogFault, ...] = ()
    lost: tuple[LogFault, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every group that has a proof holds what the proof says."""
        return not self.faults


def verify_log(reader: LogReader, *, on_group: OnGroup | None = None) -> LogVerification:
    """Check the whole log as of now; holds one group in memory.

    Raises:
        CorruptLogError: a group cannot be read at all, or does not follow the one before.
    """
    oldest, end = reader.oldest(), reader.end()
    first = oldest.sequence if oldest is not None else 0
    groups = unproven = changes = transactions = 0
    windows = WindowSet()
    # What the oldest group that is left has to follow was retired.
    chain = NO_TRANSACTION if first == 0 else None
    faults: list[LogFault] = []
    lost: list[LogFault] = []
    for group in reader.read(after_sequence=first - 1):
        groups += 1
        proof = group.header.proof
        if group.header.lost is not None:
            lost.append(LogFault(sequence=group.header.sequence, what=f"lost, {group.header.lost}"))
        elif proof is None:
            unproven += 1
        else:
            faults += check_group(group, proof, after=chain)
            changes += sum(proof.windows.counts.values())
            transactions += proof.chain.count - chain.count if chain is not None else group.header.transaction_count
            windows = windows.merge(proof.windows)
        # The stored chain, not the computed one: a fault is told once and not in every group behind it.
        chain = group.header.known_chain
        if on_group is not None:
            on_group(groups, end.sequence + 1 - first)
    return LogVerification(
        groups=groups,
        unproven=unproven,
        changes=changes,
        transactions=transactions,
        position=end.position,
        windows=windows,
        faults=tuple(faults),
        lost=tuple(lost),
    )


def check_group(group: StoredGroup, proof: Proof, *, after: Chain | None) -> Iterator[LogFault]:
    """What in a group is not as its reader saw it; `after` is the chain of the group before, `None` if not known."""
    sequence = group.header.sequence
    found = WindowSet.of(group.batches)
    for table, minute in sorted(found.subtract(proof.windows).windows):
        stands, seen = (windows.windows.get((table, minute), NO_CHANGES) for windows in (found, proof.windows))
        yield LogFault(sequence=sequence, table=table, minute=minute, what=_difference(stands, seen))
    if after is None:
        return
    try:
        chain = after.after(group.batches)
    except BrokenProofError as error:
        yield LogFault(sequence=sequence, what=str(error))
        return
    if chain != proof.chain:
        yield LogFault(
            sequence=sequence,
            what=f"after {after.position} (transaction {after.count:,}) come those up to {chain.position} "
            f"({chain.count:,}); the reader saw them up to {proof.chain.position} ({proof.chain.count:,})",
        )


def _difference(stands: Window, seen: Window) -> str:
    if stands.count != seen.count:
        return f"the reader saw {seen.count:,} changes, the log has {stands.count:,}"
    return f"the reader saw {seen.count:,} changes, the log has as many and not the same"
