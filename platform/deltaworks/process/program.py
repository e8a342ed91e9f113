"""What an app has declared, as the engine reads it; `app` is how it is declared."""

import copy
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from deltaworks.process.check import check_app, check_steps
from deltaworks.process.declared import MAKING, ClientFactory, DedupStep, EnrichStep, OnChangeStep, Step, WindowStep
from deltaworks.process.letters import DeadLetter
from deltaworks.process.shape import is_record
from deltaworks.process.sink import SinkSpec
from deltaworks.process.source import Table
from deltaworks.schema import TableSchema

WINDOW_KEY = "window_id"
"""The key of a window's document: the values of `by` and the window's start."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Declared:
    steps: list[Step] = field(default_factory=list)
    on_change: list[OnChangeStep] = field(default_factory=list)
    sinks: list[SinkSpec] = field(default_factory=list)
    clients: dict[str, ClientFactory] = field(default_factory=dict)


class Program:
    """Tables, steps in their order, sinks and clients. The first table holds the entities."""

    def __init__(self, name: str, *, key: str, tables: Sequence[Table[Any]], on_fail: DeadLetter) -> None:
        self.name = name
        self.on_fail = on_fail
        self.key = key
        self._steps = _Declared()
        self.entity: Table[Any] = tables[0]
        self.related: tuple[Table[Any], ...] = tuple(tables[1:])

    @property
    def source(self) -> str:
        """The name of the source that all tables come from."""
        return self.entity.source

    @property
    def tables(self) -> tuple[Table[Any], ...]:
        """Every table that the app reads: the entities', the related ones, the looked-up ones."""
        return (self.entity, *self.related, *self.lookups)

    @property
    def steps(self) -> Sequence[Step]:
        """Every step that a change goes through, in the order of their declaration."""
        return self._steps.steps

    @property
    def filters(self) -> Sequence[Step]:
        """The filters in the order of their declaration; all of them must hold."""
        return [step for step in self.steps if step.kind == "filter"]

    @property
    def enrichments(self) -> Sequence[EnrichStep]:
        """The enrichments in the order they run; a later one sees what an earlier one found."""
        return [step for step in self.steps if isinstance(step, EnrichStep)]

    @property
    def making(self) -> Sequence[Step]:
        """The steps that make the document, one after the other; without any the entity's row is the document."""
        return [step for step in self.steps if step.kind in MAKING]

    @property
    def deduplication(self) -> DedupStep | None:
        """The step that holds back documents which left already."""
        return next((step for step in self.steps if isinstance(step, DedupStep)), None)

    @property
    def windowing(self) -> WindowStep | None:
        """The step that makes a document of many."""
        return next((step for step in self.steps if isinstance(step, WindowStep)), None)

    @property
    def document_key(self) -> str:
        """The key's name for sinks: the app's, or `window_id` of an app that aggregates."""
        return self.key if self.windowing is None else WINDOW_KEY

    @property
    def reactions(self) -> Sequence[OnChangeStep]:
        """The steps under `on_change`."""
        return self._steps.on_change

    @property
    def sinks(self) -> Sequence[SinkSpec]:
        """The declared sinks in the order they are written."""
        return self._steps.sinks

    @property
    def clients(self) -> Mapping[str, ClientFactory]:
        """The declared clients by name."""
        return self._steps.clients

    @property
    def lookups(self) -> tuple[Table[Any], ...]:
        """The tables whose changes make entities that used them run again."""
        return tuple(step.lookup for step in self.enrichments if step.lookup is not None)

    def with_sinks(self, sinks: Sequence[SinkSpec]) -> Self:
        """The same app writing to these sinks instead of its own, for tests and trials; shares all steps."""
        other = copy.copy(self)
        other._steps = replace(self._steps, sinks=list(sinks))
        return other

    def replayed(self, sinks: Sequence[SinkSpec]) -> Self:
        """The same app writing to these sinks, without its `on_change`: those transitions were told when they came."""
        other = copy.copy(self)
        other._steps = replace(self._steps, sinks=list(sinks), on_change=[])
        return other

    # Checking

    def check(self, table_schemas: Iterable[TableSchema], *, is_complete: bool = True) -> None:
        """Compare the declared tables, clients and document with what is there; see `check.check_app`."""
        check_app(self, table_schemas, is_complete=is_complete)

    def validate(self) -> None:
        """Check what can be known once the whole module is loaded; see `check.check_steps`."""
        check_steps(self)

    def document_type(self) -> type | None:
        """The `TypedDict` or dataclass that `transform` declares to return, if it does."""
        making = self.making
        if not making:
            return self.entity.schema
        declared = typing.get_type_hints(making[-1].function).get("return") if making[-1].label is None else None
        return declared if is_record(declared) else None
