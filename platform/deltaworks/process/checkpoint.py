"""How far an app has taken its log: what its state says to its runner, and to other processes."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deltaworks.log.change_log import CorruptLogError, LogEnd, StoredGroup
from deltaworks.position import START, Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The last folded group of the log, the changes folded so far and the source's position there.

    `reached` is the position that the sinks were last told of.
    """

    sequence: int = -1
    offset: int = 0
    position: Lsn = START
    reached: Lsn = START

    @classmethod
    def stored_in(cls, connection: sqlite3.Connection) -> Self:
        """That of a state; the first one where it has none yet."""
        row = connection.execute("select sequence, offset, position, reached from checkpoint").fetchone()
        if row is None:
            return cls()
        return cls(sequence=row[0], offset=row[1], position=Lsn(row[2]), reached=Lsn(row[3]))

    def check_leads_to(self, groups: Sequence[StoredGroup], *, app: str) -> None:
        """Check that groups go on where this is.

        Raises:
            CorruptLogError: it is another log, or was restored to before this and has grown past it.
        """
        if self.sequence >= 0 and groups and not groups[0].header.may_follow(self.position):
            found = groups[0].header.previous_position
            raise CorruptLogError(
                f"app {app!r} has read the log up to {str(self.position)!r}, and what comes next there follows "
                f"{str(found)!r}: the log was made anew, or was restored to before that; remove what this app and its "
                "sinks have made and start over"
            )

    def check_is_in(self, end: LogEnd, *, app: str) -> None:
        """Check that a log reaches to where this is.

        Raises:
            CorruptLogError: it lost its tail, is another log, or was restored to before this.
        """
        if end.sequence < self.sequence or (end.sequence == self.sequence and end.position != self.position):
            raise CorruptLogError(
                f"app {app!r} has read the log up to group {self.sequence} at {str(self.position)!r}, and the log ends "
                f"at group {end.sequence} at {str(end.position)!r}: its tail was lost, it was made anew, or was "
                "restored to before that; after a power cut start first what writes it, which finds all that was "
                "durable; else remove what this app and its sinks have made and start over"
            )


def read_checkpoint(file: Path) -> Checkpoint:
    """The checkpoint of an app, for another process than its runner's; the first one where it has none yet."""
    if not file.exists():
        return Checkpoint()
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return Checkpoint.stored_in(connection)
        except sqlite3.OperationalError:
            # The runner is creating the file at this moment.
            return Checkpoint()


def read_reached(file: Path) -> Lsn:
    """The position that the sinks of an app were told of, for another process than its runner's."""
    return read_checkpoint(file).reached
