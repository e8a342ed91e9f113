"""What a scan has noted and nobody has taken yet: a line for each change, and one for each transaction that ended.

    state          counts and places, see `scan`; `CLOSED` of the `COUNT` changes belong to transactions that have ended
    changes        ──closed──│──of the open transaction──│ free
    transactions   ──ended───│ free

The kernel of `scan` writes into these arrays, and stops where one is full.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.compiled import Longs

_FIRST_LINES = 4096


@dataclass(slots=True, kw_only=True)
class Lines:
    """The lines of one stream. Not thread-safe. Offsets in them are places in the buffer that was scanned."""

    state: Longs
    changes: Longs
    transactions: Longs

    @classmethod
    def at(cls, position: int, *, nearby_xid: int) -> Self:
        """None yet, of a stream that begins after a position."""
        return cls(
            state=scan.new_state(position=position, nearby_xid=nearby_xid),
            changes=np.empty((_FIRST_LINES, scan.CHANGE_SIZE), np.int64),
            transactions=np.empty((_FIRST_LINES, scan.TRANSACTION_SIZE), np.int64),
        )

    def grow(self) -> None:
        """Make room for one more of each."""
        if self.state[scan.COUNT] == len(self.changes):
            self.changes = _doubled(self.changes)
        if self.state[scan.TRANSACTIONS] == len(self.transactions):
            self.transactions = _doubled(self.transactions)

    def add(self, slot: int, op: str, *, new: int = 0) -> None:
        """Note a change that the message which the scan stopped at brings; `new` is where its values are."""
        state = self.state
        self.grow()
        line = self.changes[state[scan.COUNT]]
        line[[scan.SLOT, scan.OP, scan.NEW, scan.OLD]] = slot, ord(op), new, 0
        line[[scan.PLACE, scan.TRANSACTION]] = state[scan.ORDINAL], state[scan.TRANSACTIONS]
        line[[scan.END, scan.FRAME]] = state[scan.STOP], state[scan.AT]
        state[scan.COUNT] += 1
        state[scan.ORDINAL] += 1

    def drop_closed(self) -> int:
        """Let go of what is closed; gives how many bytes before what is left are done with, which the buffer drops."""
        state = self.state
        closed, count = int(state[scan.CLOSED]), int(state[scan.COUNT])
        start = int(self.changes[closed, scan.FRAME]) if count > closed else int(state[scan.AT])
        left = self.changes[: count - closed]
        left[:] = self.changes[closed:count]
        left[:, scan.TRANSACTION] = 0
        for column in (scan.NEW, scan.OLD):
            # An offset of 0 stands for no row.
            left[:, column] = np.where(left[:, column] == 0, 0, left[:, column] - start)
        for column in (scan.END, scan.FRAME):
            left[:, column] -= start
        state[scan.AT] -= start
        state[scan.STOP] = max(0, state[scan.STOP] - start)
        state[scan.COUNT], state[scan.CLOSED], state[scan.TRANSACTIONS] = count - closed, 0, 0
        return start


def _doubled(lines: Longs) -> Longs:
    larger: npt.NDArray[np.int64] = np.empty((2 * len(lines), lines.shape[1]), np.int64)
    larger[: len(lines)] = lines
    return larger
