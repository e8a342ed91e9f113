"""What a direct app remembers of its reading: the range that is on its way, and whether it keeps rows after all.

The end of a range is on disk before anything of it is in a sink. So after a crash the same range is read again as
one, and a document that left is followed only by itself or by newer ones.
"""

import sqlite3

STATEMENT = """
    create table plan (
      id integer primary key check (id = 0), reading_to int not null default -1, keeps_rows int not null default 0,
      fold_to int not null default -1)
    """
"""What creates the table."""


class Plan:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def reading_to(self) -> int:
        """The last group of the range that was begun last; -1 before the first."""
        return self._read("reading_to", -1)

    def keeps_rows(self) -> bool:
        """Whether the app met changes that only rows can explain."""
        return bool(self._read("keeps_rows", 0))

    def fold_to(self) -> int:
        """The group up to which rows are folded before anything is processed: documents of it have left."""
        return self._read("fold_to", -1)

    def begin(self, sequence: int) -> None:
        """Say how far the next range goes; inside `folding`."""
        self._connection.execute(
            "insert into plan (id, reading_to) values (0, :to) on conflict do update set reading_to = :to",
            {"to": sequence},
        )

    def keep_rows(self, *, fold_to: int) -> None:
        """Say that rows are kept from now on; inside `folding`."""
        self._connection.execute("insert or replace into plan (id, keeps_rows, fold_to) values (0, 1, ?)", (fold_to,))

    def _read(self, column: str, default: int) -> int:
        row = self._connection.execute(f"select {column} from plan").fetchone()
        return default if row is None else int(row[0])
