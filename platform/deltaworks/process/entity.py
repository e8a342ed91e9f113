"""What a step sees: one entity with its related rows, as they are now.

A step never sees a change by itself. Changes are folded into rows first; a key that was touched,
once or a thousand times, is then processed once from its newest state. So a step is a function of
state, and running it again is always safe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

import msgspec

from deltaworks.position import Version
from deltaworks.process.source import Table

R = TypeVar("R")
T = TypeVar("T")


# One is made for every change, in a seventh of the time that a dataclass takes; nobody changes one.
class Entity(msgspec.Struct, Generic[R], gc=False):
    """One entity as the steps of an app see it; an entity whose row is gone has no steps.

    `after` is its row, of the declared schema. `version` and `committed_at` are those of the newest
    change to it, to its related rows or to a row that an enrichment looked up. `entity["people"]` is
    what the enrichment `into="people"` found.
    """

    key: Any  # Any: the key column is an int or a text
    after: R
    version: Version
    committed_at: datetime
    related: Mapping[str, Sequence[Any]]  # Any: rows of each table's own schema
    enriched: Mapping[str, Any] = {}  # Any: what a service answers

    def __repr__(self) -> str:
        # Rows are nobody's business in a log.
        return f"Entity(key={self.key!r}, version={self.version!r}, committed_at={self.committed_at!r})"

    @overload
    def rows(self, table: Table[T]) -> Sequence[T]: ...
    @overload
    def rows(self, table: str) -> Sequence[Any]: ...
    def rows(self, table: Table[Any] | str) -> Sequence[Any]:
        """The related rows of one table in the order of their keys; may be empty.

        Raises:
            KeyError: the app does not read that table.
        """
        name = table if isinstance(table, str) else table.name.short
        if name not in self.related:
            raise KeyError(f"no related table {name!r}; the app reads {', '.join(self.related) or 'none'}")
        return self.related[name]

    @overload
    def row(self, table: Table[T]) -> T | None: ...
    @overload
    def row(self, table: str) -> Any: ...
    def row(self, table: Table[Any] | str) -> Any:
        """The only related row of a table with one row per entity, or `None`.

        Raises:
            ValueError: there are more.
        """
        rows = self.rows(table)
        if len(rows) > 1:
            raise ValueError(f"{len(rows)} related rows where one was expected; use rows()")
        return rows[0] if rows else None

    def __getitem__(self, name: str) -> Any:
        """What the enrichment of that name found."""
        return self.enriched[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition(Generic[R]):
    """One change of a watched column, for a step under `App.on_change`.

    Delivered at least once, in order per key, after the documents of the same changes are
    searchable. `id` is the same at every delivery: hand it on as an idempotency key.
    """

    id: str
    key: Any  # Any: the key column is an int or a text
    column: str
    before: Any = field(repr=False)  # Any: a value of the watched column
    after: R = field(repr=False)
    version: Version
    committed_at: datetime
