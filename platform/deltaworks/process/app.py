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
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from deltaworks.process.arrow import sql_function
from deltaworks.process.backoff import Backoff
from deltaworks.process.check import AppError, check_tables
from deltaworks.process.declared import (
    Aggregate,
    ClientFactory,
    DedupStep,
    EnrichStep,
    OnChangeStep,
    ProjectStep,
    Step,
    TableStep,
    WindowStep,
    count,
    least,
    mean,
    most,
    place_of,
    place_of_caller,
    projection,
    total,
    window_fault,
)
from deltaworks.process.enriching.breaker import Breaker
from deltaworks.process.enriching.cache import Ttl
from deltaworks.process.enriching.changed import Changed, changed
from deltaworks.process.letters import DeadLetter
from deltaworks.process.options import Partial, number_faults, option_faults
from deltaworks.process.program import Program
from deltaworks.process.sink import SinkSpec
from deltaworks.process.source import Source, Table

__all__ = [
    "ANY",
    "App",
    "AppError",
    "Backoff",
    "Breaker",
    "ClientFactory",
    "DeadLetter",
    "EnrichStep",
    "OnChangeStep",
    "Source",
    "Step",
    "Table",
    "Ttl",
    "changed",
    "count",
    "least",
    "mean",
    "most",
    "total",
]

F = TypeVar("F", bound=Callable[..., Any])


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()
"""For `on_change`: whatever the column became."""


class App(Program):
    """One stream program: tables in, documents out, one per entity.

    Order: per key, documents never go back. Delivery: at least once into sinks that refuse what is
    older, so no stale write and nothing lost. Keys run in parallel; one key never runs twice at once.

    >>> from typing import TypedDict
    >>> Film = TypedDict("Film", {"title": str})
    >>> films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    >>> films.project("title")
    >>> films.entity.name.short, [step.name for step in films.steps]
    ('film', ['project'])
    """

    def __init__(
        self, name: str, *, key: str, sources: Sequence[Table[Any]], on_fail: DeadLetter | None = None
    ) -> None:
        """Declare an app. `on_fail` is what becomes of what fails for good, where a step says nothing else."""
        check_tables(name, key, sources)
        super().__init__(name, key=key, tables=sources, on_fail=on_fail or DeadLetter())

    # Declaring

    def filter(self, function: F) -> F:
        """Keep only what the step is true of; an entity for which it stops being true leaves every sink.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.filter
        ... def is_public(film): return film.after["status"] != "draft"
        >>> [step.name for step in films.filters]
        ['is_public']
        """
        self._declare(self._step("filter", function))
        return function

    def transform(self, function: F) -> F:
        """Make the document of an entity; a second transform makes another one out of it.

        A `TypedDict` or dataclass as return type is checked on every document.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.transform
        ... def document(film): return {"title": film.after["title"]}
        >>> films.making[0].name
        'document'
        """
        self._declare(self._step("transform", function))
        return function

    def project(self, *fields: str, **renamed: str) -> None:
        """Keep only these fields, and give others a new name.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> films.project("title", released="released_on")
        >>> films.steps[0].function({"title": "Alien", "released_on": "1979-05-25"})
        {'title': 'Alien', 'released': '1979-05-25'}
        """
        at = place_of_caller()
        chosen = {**{name: name for name in fields}, **renamed}
        if not chosen:
            raise AppError(f"app {self.name!r}, step 'project' ({at}): name at least one field to keep")
        if not self.making:
            known = [item.name for item in self.entity.fields]
            for name in [name for name in chosen.values() if name not in known]:
                raise AppError(
                    f"app {self.name!r}, step 'project' ({at}): no column {name!r} is declared of {self.entity}; "
                    f"known: {', '.join(known)}"
                )
        self._declare(ProjectStep(kind="project", function=projection(chosen), label="project", at=at, fields=chosen))

    def arrow(self, function: F) -> F:
        """A step over many entities at once, the vectorised form of filter and transform.

        It takes a `pyarrow.Table` with a row for each entity that changed, in its newest state: `_key`, then the
        declared columns, in the types of `shape`. It returns a table with `_key` and the columns of the
        documents; an entity that is not in it is filtered out. After a step that made documents it takes those.
        Where it raises, the table is halved until the rows at fault stand alone.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.arrow
        ... def titles(rows): return rows.select(["_key", "title"])
        >>> films.steps[0].kind
        'arrow'
        """
        step = self._step("arrow", function)
        if step.is_async:
            self._fail(function, "an arrow step computes, so it cannot be async; ask services with enrich")
        self._declare(TableStep(kind="arrow", function=function, clients=step.clients))
        return function

    def sql(self, query: str, *, name: str = "sql") -> None:
        """DuckDB SQL as an `arrow` step: a select over the entity's table by its short name.

        It sees `_key` and the declared columns and must select `_key`; after a step that made documents, they are
        its table. Types and names are checked when the app loads. Each row must come from one row, because
        what is in the table is only what changed; `window` aggregates.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> films.sql("select _key, upper(title) as title from film where status <> 'draft'")
        >>> films.steps[0].kind
        'sql'
        """
        at = place_of_caller()
        function = sql_function(query, table=self.entity.name.short)
        self._declare(TableStep(kind="sql", function=function, label=name, at=at, query=query))

    def route(self, function: F) -> F:
        """Choose sinks: the step returns the name of the sink, or the names, that the document is for.

        A document leaves every other sink, where it may have been before.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.route
        ... def by_age(film): return "archive" if film.after["year"] < 1980 else ["search", "archive"]
        """
        if any(step.kind == "route" for step in self.steps):
            self._fail(function, "there is a route already; return the names of several sinks from one")
        self._declare(self._step("route", function))
        return function

    def dedup(self, *fields: str) -> None:
        """Write a document only if it differs from the one of its key that left last, in these fields or in any.

        What left is remembered durably, by its hash. A document held back keeps its earlier version in the sinks.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> films.dedup("title", "year")
        >>> films.deduplication.fields
        ('title', 'year')
        """
        at = place_of_caller()
        if self.deduplication is not None:
            raise AppError(f"app {self.name!r}, step 'dedup' ({at}): there is one already")
        self._declare(DedupStep(kind="dedup", function=projection({}), label="dedup", at=at, fields=fields))

    def window(
        self,
        *,
        time: str,
        size: timedelta,
        every: timedelta | None = None,
        by: str | Sequence[str] = (),
        lateness: timedelta | None = None,
        when_closed: bool = False,
        **aggregates: Aggregate,
    ) -> None:
        """Aggregate documents over windows of event time; the app's documents are then one for each window.

        `time` is the field with the event's `datetime` or `date`, `by` the fields that group. A window is `size`
        long and starts every `every` (as long as `size` if left out: windows do not overlap), counted from 1970.
        Its document has `window_id`, `window_start`, `window_end`, the fields of `by` and the aggregates.

        An entity counts with its newest document; when it changes, is filtered out or deleted, its windows are
        computed again, so a window is always the `group by` of what is there now. `lateness` closes a window once
        a streamed document is that much past its end: later changes to it are counted as late and left out,
        until a dump reads them. `when_closed` lets a window's document leave only then. Versions of a window's
        documents never go back. All of it is durable with the checkpoint.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> films.window(time="released_on", size=timedelta(days=7), by="status", films=count(), newest=most("year"))
        >>> films.document_key
        'window_id'
        """
        at = place_of_caller()
        fault = window_fault(size=size, every=every, lateness=lateness, when_closed=when_closed, aggregates=aggregates)
        if fault is None and self.windowing is not None:
            fault = "there is one already; write another app"
        if fault is not None:
            raise AppError(f"app {self.name!r}, step 'window' ({at}): {fault}")
        self._declare(
            WindowStep(
                kind="window",
                function=projection({}),
                label="window",
                at=at,
                time=time,
                size=size,
                every=every or size,
                by=(by,) if isinstance(by, str) else tuple(by),
                lateness=lateness,
                when_closed=when_closed,
                aggregates=aggregates,
            )
        )

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
        rate_per_s: float | None = None,
        breaker: Breaker | None = None,
        cache: Ttl | None = None,
        partial: Partial = "unknown",
        when: Changed | None = None,
        on_fail: DeadLetter | None = None,
    ) -> Callable[[F], F]:
        """Ask a service about many keys at once; the answer is `entity[into]`.

        The step takes a list of up to `batch` distinct ids, gathered over many entities, and returns a
        mapping of those it knows. `key` says which ids an entity needs: for a list of ids `entity[into]`
        is the mapping of those found, for a single id it is the one value or `None`.

        An answer is shared by the entities that need it, so no step may change it. The return type, e.g.
        `dict[int, Person]`, is checked on every answer. An id answered with `None` is unknown. One that is
        left out is unknown too, or with `partial="retry"` is asked for again.

        At most `concurrency` calls run at once, each for at most `timeout_s`, and at most `rate_per_s` begin in a
        second. Where a call fails in a way that may
        pass (no connection, timeout, 408, 425, 429, 5xx, an answer that is not JSON, `RetryableError`) the keys
        that need it wait by `retry`, or as long as a Retry-After asks, and are tried again from their newest
        state; other keys go on. Where it fails for good (the step raises, another 4xx) the batch is
        halved until the ids at fault stand alone, and their entities become dead letters.

        `lookup`: the table behind the service; a change of a row makes the entities that used its id run again, with a
        new answer. `cache` keeps answers (see `Ttl`), and without a `lookup` they may be as old as that. `breaker`
        leaves a failing service alone for a while (see `Breaker`). `when=changed(…)` asks only when one of these
        columns changed (see `changed`).

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.enrich(into="people", key=lambda film: film.after["person_ids"], batch=50, cache=Ttl(600))
        ... async def people(person_ids, talent): return await talent.names(person_ids)
        >>> films.enrichments[0].clients
        ('talent',)
        """

        def declare(function: F) -> F:
            step = self._step("enrich", function)
            columns = [item.name for item in self.entity.fields]
            numbers = number_faults(batch=batch, concurrency=concurrency, timeout_s=timeout_s, rate_per_s=rate_per_s)
            options = option_faults(breaker=breaker, cache=cache, partial=partial, when=when, columns=columns)
            for fault in (*numbers, *options):
                self._fail(function, fault)
            if not callable(key):
                self._fail(function, f"key must be a function of the entity, got {key!r}")
            if into in {other.into for other in self.enrichments}:
                self._fail(function, f"another enrichment goes into {into!r}; choose another name")
            if lookup is not None and lookup.source != self.source:
                self._fail(function, f"lookup is of source {lookup.source!r}, the app reads {self.source!r}")
            self._declare(
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
                    rate_per_s=rate_per_s,
                    breaker=breaker,
                    cache=cache,
                    partial=partial,
                    when=when,
                    on_fail=on_fail or self.on_fail,
                )
            )
            return function

        return declare

    def on_change(
        self,
        column: str,
        *,
        to: Any = ANY,
        timeout_s: float = 10.0,
        retry: Backoff | None = None,
        on_fail: DeadLetter | None = None,
    ) -> Callable[[F], F]:
        """Run the step with a `Transition` whenever a column of the entity's row changed, to `to` if given.

        Each change counts, also where several come at once. A row that a dump shows for the first
        time is no change; a created row is one. Delivery is at least once: `Transition.id` stays the same.
        A key's transitions wait while its document does, and, with `DeadLetter(hold_key=True)`, behind one that
        failed for good.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.on_change("status", to="released")
        ... async def announce(change, partner): await partner.tell(change.id, change.after["title"])
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
                    on_fail=on_fail or self.on_fail,
                )
            )
            return function

        return declare

    def client(self, factory: F) -> F:
        """Declare a client that steps take by the factory's name.

        The factory takes the app's settings. A generator (`async` or not) yields the client once and closes
        it after; a plain function returns it. Opened when the app starts, closed when it stops.

        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> @films.client
        ... def talent(settings): return settings["talent_url"]
        >>> list(films.clients)
        ['talent']
        """
        if factory.__name__ in self._steps.clients:
            self._fail(factory, f"there is a client {factory.__name__!r} already")
        self._steps.clients[factory.__name__] = ClientFactory(
            name=factory.__name__, open=factory, place=place_of(factory)
        )
        return factory

    def sink(self, spec: SinkSpec) -> None:
        """Write every document to this sink too.

        >>> from deltaworks.testing.memory_sink import MemorySink
        >>> from deltaworks.testing.films import films_app
        >>> films = films_app()
        >>> films.sink(MemorySink("search"))
        >>> [spec.name for spec in films.sinks]
        ['search']
        """
        names = [other.name for other in self.sinks if type(other) is type(spec)]
        if spec.name in names:
            raise AppError(f"app {self.name!r}: two sinks are {type(spec).__name__} {spec.name!r}; rename one")
        self._steps.sinks.append(spec)

    def _declare(self, step: Step) -> None:
        last = self.steps[-1] if self.steps else None
        fault = None
        if last is not None and last.kind == "window":
            fault = f"nothing comes after the window at {last.place}; its documents go to the sinks"
        elif step.kind == "enrich" and self.making:
            fault = f"an enrichment sees entities, so declare it before {self.making[0].name!r}"
        elif step.kind == "window" and any(each.kind == "route" for each in self.steps):
            fault = "a window's documents go to every sink; take the route away or write another app"
        elif last is not None and last.kind == "dedup" and step.kind != "window":
            fault = f"dedup at {last.place} looks at what leaves, so declare it last"
        if fault is not None:
            raise AppError(f"app {self.name!r}, step {step.name!r} ({step.place}): {fault}")
        self._steps.steps.append(step)

    def _step(self, kind: str, function: Callable[..., Any]) -> Step:
        if not inspect.isroutine(function):
            raise AppError(f"app {self.name!r}: {kind} needs a function, got {function!r}")
        parameters = list(inspect.signature(function).parameters)
        if not parameters:
            self._fail(function, f"{kind} hands it one argument, it takes none")
        is_async = inspect.iscoroutinefunction(function)
        return Step(kind=kind, function=function, clients=tuple(parameters[1:]), is_async=is_async)

    def _fail(self, function: Callable[..., Any], fault: str) -> NoReturn:
        raise AppError(f"app {self.name!r}, step {function.__name__!r} ({place_of(function)}): {fault}")
