"""PostgreSQL's snapshots: which transactions a statement sees."""

from dataclasses import dataclass
from typing import Self

from deltaworks.errors import InvariantError


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What `pg_current_snapshot()` says, with 64-bit ids of top-level transactions.

    >>> snapshot = Snapshot.parse("10:14:11,12")
    >>> [txid for txid in range(9, 16) if snapshot.sees(txid, commit=0)]
    [9, 10, 13]
    """

    oldest_running: int
    first_unknown: int
    """No transaction from this id on had ended; some may run without being listed."""
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the server's `xmin:xmax:xip,xip,…`."""
        try:
            oldest, following, running = text.split(":")
            return cls(
                oldest_running=int(oldest),
                first_unknown=int(following),
                running=frozenset(int(txid) for txid in running.split(",") if txid),
            )
        except ValueError as error:
            raise InvariantError(f"cannot read the snapshot {text!r}; expected e.g. '10:20:10,14'") from error

    def sees(self, txid: int, *, commit: int) -> bool:  # noqa: ARG002  commits become visible in any order here
        """Whether the effects of this committed transaction are visible; where it was committed says nothing."""
        return txid < self.oldest_running or (txid < self.first_unknown and txid not in self.running)
