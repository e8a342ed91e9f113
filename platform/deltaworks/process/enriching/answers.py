"""Answers kept for enrichments with `when=changed(…)`: one for each entity, in the app's state.

Saved with the keys that settle, so an answer is never kept of a document that did not leave. Losing one only means
asking again.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from deltaworks.process.enriching.changed import Kept
from deltaworks.process.fold import Key

STATEMENT = """
    create table answer (
      enrichment text, entity, basis text not null, answer text not null,
      primary key (enrichment, entity)) without rowid
"""
"""What creates the table."""


class Answers:
    """The kept answers of a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection, enrichments: Iterable[str]) -> None:
        self._connection = connection
        self._enrichments = tuple(enrichments)

    def load(self, keys: Sequence[Key]) -> dict[Key, dict[str, Kept]]:
        """What is kept for these entities, by the enrichment's `into`."""
        found: dict[Key, dict[str, Kept]] = {}
        for into in self._enrichments:
            for entity, basis, answer in self._connection.execute(
                "select a.entity, a.basis, a.answer from json_each(?) k cross join answer a "
                "on a.enrichment = ? and a.entity = k.value",
                (json.dumps(keys), into),
            ):
                found.setdefault(entity, {})[into] = Kept(basis, answer)
        return found

    def save(self, into: str, kept: Mapping[Key, Kept | None]) -> None:
        """Keep answers, and forget where there is none; inside `settling`."""
        self._connection.executemany(
            "insert or replace into answer values (?, ?, ?, ?)",
            [(into, key, *found) for key, found in kept.items() if found is not None],
        )
        self.forget([key for key, found in kept.items() if found is None], into=into)

    def forget(self, keys: Iterable[Key] | None, *, into: str | None = None) -> None:
        """Forget answers: of these entities or, with `None`, of all; of one enrichment, or of all; in a transaction."""
        for name in self._enrichments if into is None else (into,):
            if keys is None:
                self._connection.execute("delete from answer where enrichment = ?", (name,))
            elif name in self._enrichments:
                self._connection.executemany(
                    "delete from answer where enrichment = ? and entity = ?", ((name, key) for key in keys)
                )
