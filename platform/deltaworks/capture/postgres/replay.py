"""A spilled transaction, read back a few changes at a time."""

from typing import TYPE_CHECKING

from deltaworks.capture.postgres.buffer import FIRST_BYTES, RECEIVE_BYTES
from deltaworks.capture.postgres.spill import Spill
from deltaworks.change import ChangeBatch

if TYPE_CHECKING:
    from deltaworks.capture.postgres.columnar import SliceBuilder

REPLAYED_BYTES = FIRST_BYTES - RECEIVE_BYTES
"""What one slice of a spilled transaction is made of, and a read more: so that its buffer need not grow."""


class Replay:
    """Gives the changes of one transaction in order, through a builder that reads nothing else."""

    def __init__(self, inner: "SliceBuilder", spill: Spill, *, commit: int, txid: int, committed_at_us: int) -> None:
        self.commit = commit
        self.committed_at_us = committed_at_us
        self.mark: str | None = None
        """The first mark so far."""
        self.has_changes = False
        self._inner = inner
        self._spill = spill
        spill.rewind()
        inner.begin_kept(has_xid=spill.has_xid, transaction=(commit, txid, committed_at_us))

    def next_batches(self, max_changes: int) -> tuple[tuple[ChangeBatch, ...], bool]:
        """The next changes, and whether they are the last."""
        inner, spill = self._inner, self._spill
        while inner.kept_count < max_changes and inner.buffer.end < REPLAYED_BYTES and not spill.is_read:
            if (relation := spill.next_relation()) is not None:
                inner.relations.learn(relation)
                continue
            spill.read(inner.buffer)
            inner.scan_kept()
        self.has_changes |= inner.kept_count > 0
        self.mark = inner.pending_mark
        batches = inner.take_kept()
        is_last = spill.is_read
        if is_last:
            self.close()
        return batches, is_last

    def close(self) -> None:
        """Give the disk space back."""
        self._spill.close()
