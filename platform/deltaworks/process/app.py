"""The stream DSL: an app is a Python module with decorators.

    studio = Source("studio")
    credit = studio.table("credit", key="movie_id", schema=Credit)
    movies = App("movie_search", key="movie_id", sources=[studio.table("movie", schema=Movie), credit])

    @movies.filter                                  keep or drop an entity
    @movies.enrich(into="people", key=…, batch=500) ask a service, many keys in one call
    @movies.transform                               make the document
    @movies.on_change("status", to="released")      run a step when a column changed
    movies.sink(SearchIndex("movies", …))           leave

The first table holds the entities, the others rows that belong to them. Declaring does nothing but
remember: no connection is opened at import. What is wrong with a declaration is said at once, with
the app, the step, its file and line; what needs the source's tables is said by `check`, before the
first change is read.

Steps may be `def` or `async def`. A `filter` or `transform` should be quick; an `enrich` that is a plain
`def` runs in a thread, so it may block. After its first parameter a step takes clients by name.
"""

import inspect
import random
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from deltaworks.errors import TerminalError
from deltaworks.process.shape import is_record
from deltaworks.process.sink import SinkSpec
from deltaworks.process.source import SchemaFault, SchemaMismatchError, Source, Table, schema_faults
from deltaworks.schema import TableSchema

__all__ = [
    "ANY",
    "App",
    "AppError",
    "Backoff",
    "ClientFactory",
    "EnrichStep",
    "OnChangeStep",
    "Source",
    "Step",
    "Table",
]

F = TypeVar("F", bound=Callable[..., Any])


class AppError(TerminalError):
    """An app is declared in a way that cannot run."""


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()
"""For `on_change`: whatever the column became."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long a key waits after its n-th failed try: doubling from `first_s` up to `max_s`, with jitter.

    `attempts`: after that many a key is a dead letter; for ever when left out.
    """

    first_s: float = 0.2
    max_s: float = 30.0
    attempts: int | None = None

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait after failed try `attempt`, counted from 1; half to whole of the full wait."""
        full = min(self.max_s, self.first_s * 2.0 ** min(attempt - 1, 32))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, protects nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decorated function and where it stands; `clients` are the parameters after the first."""

    kind: str
    function: Callable[..., Any]
    clients: tuple[str, ...]
    is_async: bool

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def place(self) -> str:
        """File and line of the function."""
        return _place(self.function)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrichStep(Step):
    """An enrichment; see `App.enrich`."""

    into: str
    key: Callable[[Any], Any]
    batch: int
    concurrency: int
    timeout_s: float
    retry: Backoff
    lookup: Table[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnChangeStep(Step):
    """A step that runs when a column of the entity changed; see `App.on_change`."""

    column: str
    to: Any
    timeout_s: float
    retry: Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFactory:
    """Opens a client from the app's settings; see `App.client`."""

    name: str
    open: Callable[[Mapping[str, Any]], Any]
    place: str


@dataclass(slots=True, kw_only=True, eq=False)
class _Declared:
    filters: list[Step] = field(default_factory=list)
    enrichments: list[EnrichStep] = field(default_factory=list)
    transform: Step | None = None
    on_change: list[OnChangeStep] = field(default_factory=list)
    sinks: list[SinkSpec] = field(default_factory=list)
    clients: dict[str, ClientFactory] = field(default_factory=dict)


class App:
    """One stream program: tables in, documents out, one per entity.

    Order: per key, documents never go back. Delivery: at least once into sinks that refuse what is
    older, so no stale write and nothing lost. Keys run in parallel; one key never runs twice at once.
    """

    def __init__(self, name: str, *, key: str, sources: Sequence[Table[Any]]) -> None:
        self.name = name
        self.key = key
        self._steps = _Declared()
        self._check_tables(sources)
        self.entity: Table[Any] = sources[0]
        self.related: tuple[Table[Any], ...] = tuple(sources[1:])

    @property
    def source(self) -> str:
        """The name of the source that all tables come from."""
        return self.entity.source

    @property
    def tables(self) -> tuple[Table[Any], ...]:
        """Every table that the app reads: the entities', the related ones, the looked-up ones."""
        return (self.entity, *self.related, *self.lookups)

    @property
    def filters(self) -> Sequence[Step]:
        """The filters in the order of their declaration; all of them must hold."""
        return self._steps.filters

    @property
    def enrichments(self) -> Sequence[EnrichStep]:
        """The enrichments in the order they run; a later one sees what an earlier one found."""
        return self._steps.enrichments

    @property
    def transformation(self) -> Step | None:
        """The step that makes the document; without one the entity's row is the document."""
        return self._steps.transform

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

    # Declaring

    def filter(self, function: F) -> F:
        """Keep only entities for which the step is true; one that stops holding leaves every sink."""
        self._steps.filters.append(self._step("filter", function))
        return function

    def transform(self, function: F) -> F:
        """Make the document of an entity. A `TypedDict` or dataclass as return type is checked on every document."""
        if self._steps.transform is not None:
            self._fail(function, f"there is a transform already, at {self._steps.transform.place}; keep one")
        self._steps.transform = self._step("transform", function)
        return function

    def enrich(
        self,
        *,
        into: str,
        key: Callable[[Any], Any],
        batch: int = 100,
        concurrency: int = 8,
        timeout_s: float = 5.0,
        retry: Backoff | None = None,
        lookup: Table[Any] | None = None,
    ) -> Callable[[F], F]:
        """Ask a service about many keys at once; the answer is `entity[into]`.

        The step takes a list of up to `batch` distinct ids, gathered over many entities, and returns a
        mapping of those it knows. `key` says which ids an entity needs: for a list of ids `entity[into]`
        is the mapping of those found, for a single id it is the one value or `None`.

        At most `concurrency` calls run at once, each for at most `timeout_s`. Where a call fails in a way that may
        pass (no connection, timeout, 408, 425, 429, 5xx, an answer that is not JSON, `RetryableError`) the keys
        that need it wait by `retry`, or as long as a Retry-After asks, and are tried again from their newest
        state; other keys go on. Where it fails for good (the step raises, another 4xx) the batch is
        halved until the ids at fault stand alone, and their entities become dead letters.

        `lookup`: the table behind the service; a change of a row makes the entities that used its id run again.
        """

        def declare(function: F) -> F:
            step = self._step("enrich", function)
            numbers = {"batch": batch, "concurrency": concurrency, "timeout_s": timeout_s}
            for option, value in numbers.items():
                if value <= 0:
                    self._fail(function, f"{option} must be more than 0, got {value!r}")
            if not callable(key):
                self._fail(function, f"key must be a function of the entity, got {key!r}")
            if into in {other.into for other in self.enrichments}:
                self._fail(function, f"another enrichment goes into {into!r}; choose another name")
            if lookup is not None and lookup.source != self.source:
                self._fail(function, f"lookup is of source {lookup.source!r}, the app reads {self.source!r}")
            self._steps.enrichments.append(
                EnrichStep(
                    kind=step.kind,
                    function=step.function,
                    clients=step.clients,
                    is_async=step.is_async,
                    into=into,
                    key=key,
                    batch=batch,
                    concurrency=concurrency,
                    timeout_s=timeout_s,
                    retry=retry or Backoff(),
                    lookup=lookup,
                )
            )
            return function

        return declare

    def on_change(
        self, column: str, *, to: Any = ANY, timeout_s: float = 10.0, retry: Backoff | None = None
    ) -> Callable[[F], F]:
        """Run the step with a `Transition` whenever a column of the entity's row changed, to `to` if given.

        Each change counts, also where several come at once. A row that a dump shows for the first
        time is no change; a created row is one. Delivery is at least once: `Transition.id` stays the same.
        """

        def declare(function: F) -> F:
            step = self._step("on_change", function)
            known = [known.name for known in self.entity.fields]
            if column not in known:
                self._fail(function, f"no column {column!r} is declared of {self.entity}; known: {', '.join(known)}")
            if timeout_s <= 0:
                self._fail(function, f"timeout_s must be more than 0, got {timeout_s!r}")
            self._steps.on_change.append(
                OnChangeStep(
                    kind=step.kind,
                    function=step.function,
                    clients=step.clients,
                    is_async=step.is_async,
                    column=column,
                    to=to,
                    timeout_s=timeout_s,
                    retry=retry or Backoff(),
                )
            )
            return function

        return declare

    def client(self, factory: F) -> F:
        """Declare a client that steps take by the factory's name.

        The factory takes the app's settings. A generator (`async` or not) yields the client once and closes
        it after; a plain function returns it. Opened when the app starts, closed when it stops.
        """
        if factory.__name__ in self._steps.clients:
            self._fail(factory, f"there is a client {factory.__name__!r} already")
        self._steps.clients[factory.__name__] = ClientFactory(
            name=factory.__name__, open=factory, place=_place(factory)
        )
        return factory

    def sink(self, spec: SinkSpec) -> None:
        """Write every document to this sink too."""
        names = [other.name for other in self.sinks if type(other) is type(spec)]
        if spec.name in names:
            raise AppError(f"app {self.name!r}: two sinks are {type(spec).__name__} {spec.name!r}; rename one")
        self._steps.sinks.append(spec)

    # Checking

    def check(self, table_schemas: Iterable[TableSchema], *, is_complete: bool = True) -> None:
        """Compare the declared tables, clients and document with what is there.

        `is_complete` says that all tables of the source are given, so that an absent one is a fault.

        Raises:
            SchemaMismatchError: all faults of all tables, one a line.
            AppError: a step asks for a client that is not declared, or the app has no sink.
        """
        self.validate()
        faults = self.faults(table_schemas, is_complete=is_complete)
        if faults:
            listing = "\n".join(f"  - {fault}" for fault in faults)
            raise SchemaMismatchError(
                f"app {self.name!r} does not fit source {self.source!r}, {len(faults)} to mend:\n{listing}"
            )

    def faults(self, table_schemas: Iterable[TableSchema], *, is_complete: bool) -> list[SchemaFault]:
        """Every way in which the tables are not as declared."""
        actual = {schema.name: schema for schema in table_schemas}
        faults: list[SchemaFault] = []
        for table in self.tables:
            if table.name in actual:
                is_keyed_by = table is self.entity or table in self.lookups
                key = table.key or self.key
                faults += schema_faults(table, actual[table.name], key=key, is_keyed_by=is_keyed_by)
            elif is_complete:
                known = ", ".join(sorted(name.short for name in actual)) or "none"
                faults.append(
                    SchemaFault(
                        table=table.name, column="*", declared="a table", actual=f"not captured; known: {known}"
                    )
                )
        return faults

    def validate(self) -> None:
        """Check what can be known once the whole module is loaded.

        Raises:
            AppError: a step asks for a client that is not declared, or the app has no sink.
        """
        if not self.sinks:
            raise AppError(f"app {self.name!r} has no sink; add {self.name}.sink(…)")
        steps = [*self.filters, *self.enrichments, *self.reactions]
        for step in [*steps, self.transformation] if self.transformation else steps:
            for name in step.clients:
                if name not in self.clients:
                    known = ", ".join(self.clients) or "none"
                    self._fail(step.function, f"no client {name!r}; known: {known}. Declare one with client")

    def document_type(self) -> type | None:
        """The `TypedDict` or dataclass that `transform` declares to return, if it does."""
        if self.transformation is None:
            return self.entity.schema
        declared = typing.get_type_hints(self.transformation.function).get("return")
        return declared if is_record(declared) else None

    def _check_tables(self, tables: Sequence[Table[Any]]) -> None:
        if not tables:
            raise AppError(f"app {self.name!r} has no tables; the first of sources= holds the entities")
        names = [table.name for table in tables]
        for table in tables:
            if table.source != tables[0].source:
                raise AppError(
                    f"app {self.name!r} reads sources {tables[0].source!r} and {table.source!r}; one app, one source"
                )
            if table.schema is None:
                raise AppError(f"app {self.name!r}, table {str(table)!r}: no schema=; declare the columns to read")
            if names.count(table.name) > 1:
                raise AppError(f"app {self.name!r} lists table {str(table)!r} twice; declare all columns in one schema")
        if tables[0].key not in (None, self.key):
            raise AppError(
                f"app {self.name!r}, table {str(tables[0])!r}: key is {tables[0].key!r}, the app's is {self.key!r}"
            )

    def _step(self, kind: str, function: Callable[..., Any]) -> Step:
        if not inspect.isroutine(function):
            raise AppError(f"app {self.name!r}: {kind} needs a function, got {function!r}")
        parameters = list(inspect.signature(function).parameters)
        if not parameters:
            self._fail(function, f"{kind} hands it one argument, it takes none")
        is_async = inspect.iscoroutinefunction(function)
        return Step(kind=kind, function=function, clients=tuple(parameters[1:]), is_async=is_async)

    def _fail(self, function: Callable[..., Any], fault: str) -> NoReturn:
        raise AppError(f"app {self.name!r}, step {function.__name__!r} ({_place(function)}): {fault}")


def _place(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
