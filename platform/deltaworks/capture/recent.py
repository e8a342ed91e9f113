"""What was streamed and may still be invisible to who reads a table now.

A commit can be in the stream before a SELECT shows it, for example while it waits for a synchronous
standby. Dumps merge such changes with what they read; what every later snapshot sees is forgotten.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from deltaworks.capture.source import Visibility
from deltaworks.change import ChangeBatch
from deltaworks.schema import TableName

Transaction = tuple[int, int]
"""Its id, and its commit position."""


@dataclass(slots=True)
class Recent:
    """Streamed changes that a snapshot taken from now on may not see, per table, in commit order."""

    byte_count: int = 0
    """Of the changes in memory."""
    _batches: dict[TableName, list[ChangeBatch]] = field(default_factory=dict)
    _let_go: dict[TableName, set[Transaction]] = field(default_factory=dict)
    _seen_by_all: Visibility | None = None

    def remember(self, batch: ChangeBatch) -> None:
        """Keep of a batch that was streamed what the latest snapshot does not see."""
        unseen = batch if self._seen_by_all is None else _unseen(batch, self._seen_by_all)
        if unseen is not None:
            self._batches.setdefault(batch.schema.name, []).append(unseen)
            self.byte_count += unseen.rows.nbytes

    def forget_seen(self, visible_in: Visibility) -> None:
        """Drop what this snapshot sees: every later one sees it too."""
        self._seen_by_all = visible_in
        for table in list(self._batches):
            self._set(table, self.unseen(table, visible_in))
        for table, hidden in list(self._let_go.items()):
            left = {each for each in hidden if not visible_in.sees(each[0], commit=each[1])}
            if left:
                self._let_go[table] = left
            else:
                del self._let_go[table]

    def forget_table(self, table: TableName) -> None:
        """Drop a table that nobody dumps any more."""
        self._set(table, [])
        self._let_go.pop(table, None)

    def let_go(self) -> list[TableName]:
        """Drop all changes for the sake of memory; their tables, which are not clear until all of them are seen."""
        tables = list(self._batches)
        for table in tables:
            hidden = self._let_go.setdefault(table, set())
            for batch in self._batches[table]:
                hidden.update(transactions(batch))
            self._set(table, [])
        return tables

    def is_clear(self, table: TableName) -> bool:
        """Whether nothing was let go of that a snapshot may not see: only then may the table be read."""
        return table not in self._let_go

    def unseen(self, table: TableName, visible_in: Visibility) -> list[ChangeBatch]:
        """The changes of a table that the snapshot does not see, or may not, in commit order."""
        batches = self._batches.get(table, [])
        return [unseen for batch in batches if (unseen := _unseen(batch, visible_in)) is not None]

    def __len__(self) -> int:
        return sum(len(batch) for batches in self._batches.values() for batch in batches)

    def _set(self, table: TableName, batches: list[ChangeBatch]) -> None:
        self.byte_count -= sum(batch.rows.nbytes for batch in self._batches.pop(table, []))
        if batches:
            self._batches[table] = batches
            self.byte_count += sum(batch.rows.nbytes for batch in batches)


def transactions(batch: ChangeBatch) -> set[Transaction]:
    """The transactions of streamed changes."""
    txids = batch.rows.column("_txid").to_numpy()
    # A transaction has one commit, so its first change tells it.
    distinct, first = np.unique(txids, return_index=True)
    commits = batch.rows.column("_commit").to_numpy()[first]
    return set(zip(distinct.tolist(), commits.tolist(), strict=True))


def _unseen(batch: ChangeBatch, visible_in: Visibility) -> ChangeBatch | None:
    txids = batch.rows.column("_txid").to_numpy()
    missed = [txid for txid, commit in transactions(batch) if not visible_in.sees(txid, commit=commit)]
    if not missed:
        return None
    chosen = np.isin(txids, np.array(missed, dtype=np.uint64))
    return batch if chosen.all() else ChangeBatch(batch.schema, batch.rows.filter(pa.array(chosen)))
