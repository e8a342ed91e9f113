"""What a decorator of the DSL leaves behind: one step of an app, with its place in a file.

| step                        | takes                                       | gives                           |
|-----------------------------|---------------------------------------------|---------------------------------|
| `filter`                    | an entity, or the document so far           | whether it stays                |
| `enrich`                    | ids                                         | what a service knows of them    |
| `transform`, `project`      | an entity, or the document so far           | the document                    |
| `arrow`, `sql`              | an Arrow table of entities, or of documents | an Arrow table of documents     |
| `route`                     | an entity, or the document so far           | the names of the sinks it is for |
| `dedup`                     | the document                                | it, or nothing if it left already |
| `window`                    | documents                                   | a document for each window      |

Steps run in the order of their declaration. Before the first that makes a document they see entities, after it
what it made.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from deltaworks.process.backoff import Backoff
from deltaworks.process.enriching.breaker import Breaker
from deltaworks.process.enriching.cache import Ttl
from deltaworks.process.enriching.changed import Changed
from deltaworks.process.letters import DeadLetter
from deltaworks.process.options import Partial
from deltaworks.process.source import Table

KEY = "_key"
"""In the tables of `arrow` and `sql` steps: the entity's key. What such a step returns must have it."""

MAKING = frozenset({"transform", "project", "arrow", "sql"})
"""The kinds of step that make a document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decorated function and where it stands; `clients` are the parameters after the first.

    `label` and `at` are its name and place where no function of the app has them.
    """

    kind: str
    function: Callable[..., Any]
    clients: tuple[str, ...] = ()
    is_async: bool = False
    label: str | None = None
    at: str | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.label or self.function.__name__

    @property
    def place(self) -> str:
        """File and line of the function, or of the call that declared the step."""
        return self.at or place_of(self.function)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectStep(Step):
    """Fields of the document by their names in it, each with the name of the field it is read from."""

    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStep(Step):
    """A step over many entities at once; `query` is the SQL of an `sql` step."""

    query: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupStep(Step):
    """The fields that make a document another one; all of them when none is named."""

    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """One number over the documents of a window; made by `count`, `total`, `mean`, `least` and `most`."""

    function: str
    field: str | None = None


def count() -> Aggregate:
    """How many documents are in the window.

    >>> count()
    Aggregate(function='count', field=None)
    """
    return Aggregate(function="count")


def total(field: str) -> Aggregate:
    """The sum of a field over the window; nulls are left out, and of nothing but nulls it is null.

    >>> total("amount")
    Aggregate(function='sum', field='amount')
    """
    return Aggregate(function="sum", field=field)


def mean(field: str) -> Aggregate:
    """The mean of a field over the window, as a float.

    >>> mean("rating")
    Aggregate(function='avg', field='rating')
    """
    return Aggregate(function="avg", field=field)


def least(field: str) -> Aggregate:
    """The smallest value of a field in the window.

    >>> least("released_on")
    Aggregate(function='min', field='released_on')
    """
    return Aggregate(function="min", field=field)


def most(field: str) -> Aggregate:
    """The largest value of a field in the window.

    >>> most("released_on")
    Aggregate(function='max', field='released_on')
    """
    return Aggregate(function="max", field=field)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStep(Step):
    """Windows of event time over documents; see `App.window`."""

    time: str
    size: timedelta
    every: timedelta
    by: tuple[str, ...]
    lateness: timedelta | None
    when_closed: bool
    aggregates: Mapping[str, Aggregate]


def projection(fields: Mapping[str, str]) -> Callable[[Any], dict[str, Any]]:
    """What makes a document of these fields, from an entity or from a document.

    >>> projection({"name": "title"})({"title": "Alien", "year": 1979})
    {'name': 'Alien'}
    """
    pairs = tuple(fields.items())

    def project(value: Any) -> dict[str, Any]:
        row = getattr(value, "after", value)
        if isinstance(row, Mapping):
            return {name: row[field] for name, field in pairs}
        return {name: getattr(row, field) for name, field in pairs}

    return project


def place_of(function: Callable[..., Any]) -> str:
    """File and line of a function."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def place_of_caller() -> str:
    """File and line that called the function that asks."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def client_names(function: Callable[..., Any]) -> Sequence[str]:
    """The parameters after the first."""
    return list(inspect.signature(function).parameters)[1:]


def window_fault(
    *,
    size: timedelta,
    every: timedelta | None,
    lateness: timedelta | None,
    when_closed: bool,
    aggregates: Mapping[str, Aggregate],
) -> str | None:
    """What is wrong with the options of a window, if anything."""
    nothing = timedelta(0)
    if size <= nothing or (every is not None and not nothing < every <= size):
        return f"size must be more than 0 and every at most size, got size={size!r}, every={every!r}"
    if lateness is not None and lateness < nothing:
        return f"lateness must be 0 or more, got {lateness!r}"
    if when_closed and lateness is None:
        return "when_closed needs lateness=, which says when a window is closed"
    wrong = [name for name, aggregate in aggregates.items() if not isinstance(aggregate, Aggregate)]
    if wrong or not aggregates:
        return f"give aggregates by name, e.g. sales=count(), got {', '.join(wrong) or 'none'}"
    return None


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
    rate_per_s: float | None
    breaker: Breaker | None
    cache: Ttl | None
    partial: Partial
    when: Changed | None
    on_fail: DeadLetter


@dataclass(frozen=True, slots=True, kw_only=True)
class OnChangeStep(Step):
    """A step that runs when a column of the entity changed; see `App.on_change`."""

    column: str
    to: Any
    timeout_s: float
    retry: Backoff
    on_fail: DeadLetter


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFactory:
    """Opens a client from the app's settings; see `App.client`."""

    name: str
    open: Callable[[Mapping[str, Any]], Any]
    place: str
