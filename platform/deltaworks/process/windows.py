"""Windows of event time: which entity counts in which window, and what each window comes to.

    documents ──► member: entity, window, values ──► window: dirty ──► its document ──► settled
                  what an entity counted for before, taken back with its new values

A window is always computed from all its members, so it is the `group by` of what is there now, whatever was updated
or deleted. Its version is the newest of every document that ever moved it, so it never goes back. Members and
the mark that a window is dirty are one transaction: a crash computes the window again.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from deltaworks.position import Lsn, Version
from deltaworks.process.declared import Aggregate, WindowStep
from deltaworks.process.fold import Key, moment
from deltaworks.process.sink import Document

STATEMENTS = (
    """
    create table member (
      entity not null, start int not null, grouping text not null, amounts text not null,
      primary key (entity, start)) without rowid
    """,
    "create index member_of_window on member (start, grouping)",
    """
    create table window (
      start int not null, grouping text not null, position int not null, ordinal int not null,
      committed_at int not null, is_dirty int not null, primary key (start, grouping)) without rowid
    """,
    "create index window_dirty on window (start) where is_dirty",
    "create table event_time (id integer primary key, newest int not null)",
)
"""What creates the tables."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

Place = tuple[int, str]
"""A window: its start in microseconds since 1970, and its group as JSON."""


@dataclass(slots=True, kw_only=True)
class Counted:
    """What came of documents: `faults` by key say why one cannot be counted, `late` is how often one came too late."""

    faults: dict[Key, str] = field(default_factory=dict)
    late: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCounts:
    """Windows that have ever counted anything: what is `closed` takes no streamed change any more."""

    open: int
    closed: int


def count_windows(file: Path, step: WindowStep) -> WindowCounts:
    """The windows in a state, for another thread or process than the runner's; none where the app never ran."""
    if not file.exists():
        return WindowCounts(open=0, closed=0)
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return Windows(connection, step).counts()
        except sqlite3.OperationalError:
            # The runner is creating the file at this moment.
            return WindowCounts(open=0, closed=0)


class Windows:
    """The windows of one app. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection, step: WindowStep) -> None:
        self._connection = connection
        self._step = step
        self._size = step.size // _MICROSECOND
        self._every = step.every // _MICROSECOND
        self._lateness = None if step.lateness is None else step.lateness // _MICROSECOND

    def count(self, documents: Sequence[Document], *, are_read: frozenset[Key]) -> Counted:
        """Count documents in their windows, in place of what their keys counted for; inside `settling`.

        `are_read`: keys whose newest change is a dump's read; those are never late.
        """
        counted = Counted()
        newest = known = self._newest()
        before = self._members([document.key for document in documents])
        for document in documents:
            try:
                at, group, amounts = self._measure(document)
            except _UncountableError as error:
                counted.faults[document.key] = str(error)
                continue
            is_streamed = document.key not in are_read
            starts = () if at is None else self._starts(at)
            wanted = {(start, group): amounts for start in starts}
            old = before.get(document.key, {})
            moved = [place for place in {**old, **wanted} if old.get(place) != wanted.get(place)]
            late = {place for place in moved if is_streamed and self._is_closed(place, known)}
            counted.late += bool(late)
            for place in moved:
                if place not in late:
                    self._put(document, place, wanted.get(place))
            # An equal document that is newer moves the version of its windows too.
            for place in {*wanted, *moved} - late:
                self._touch(document, place)
            if is_streamed and at is not None:
                newest = at if newest is None else max(newest, at)
        if newest is not None and newest != known:
            self._connection.execute("insert or replace into event_time values (0, ?)", (newest,))
        return counted

    def documents(self) -> tuple[list[Document], list[Place]]:
        """The documents of windows that are dirty and may leave, and those windows."""
        newest = self._newest()
        places, documents = [], []
        dirty = self._connection.execute(
            "select start, grouping, position, ordinal, committed_at from window where is_dirty "
            "order by start, grouping"
        ).fetchall()
        for start, group, position, ordinal, committed_at in dirty:
            if self._step.when_closed and not self._is_closed((start, group), newest):
                continue
            places.append((start, group))
            documents.append(
                Document(
                    key=_window_id(start, group),
                    version=Version(Lsn(position), ordinal),
                    committed_at=moment(committed_at),
                    body=self._body(start, group),
                )
            )
        return documents, places

    def settle(self, places: Iterable[Place]) -> None:
        """Forget that these windows are dirty; inside `settling`, after every sink has flushed."""
        self._connection.executemany("update window set is_dirty = 0 where start = ? and grouping = ?", places)

    def counts(self) -> WindowCounts:
        """How many windows there are; reads each of them once."""
        newest = self._newest()
        closed = 0
        if self._lateness is not None and newest is not None:
            last = newest - self._size - self._lateness
            (closed,) = self._connection.execute("select count(*) from window where start <= ?", (last,)).fetchone()
        (total,) = self._connection.execute("select count(*) from window").fetchone()
        return WindowCounts(open=total - closed, closed=closed)

    def _newest(self) -> int | None:
        row = self._connection.execute("select newest from event_time").fetchone()
        return None if row is None else int(row[0])

    def _is_closed(self, place: Place, newest: int | None) -> bool:
        return self._lateness is not None and newest is not None and place[0] + self._size + self._lateness <= newest

    def _members(self, keys: Sequence[Key]) -> dict[Key, dict[Place, str]]:
        found: dict[Key, dict[Place, str]] = {}
        for entity, start, group, amounts in self._connection.execute(
            "select m.* from json_each(?) k cross join member m on m.entity = k.value",
            (json.dumps(keys),),
        ):
            found.setdefault(entity, {})[start, group] = amounts
        return found

    def _measure(self, document: Document) -> tuple[int | None, str, str]:
        """When it happened (`None`: in no window), its group, and the values that are aggregated."""
        if document.body is None:
            return None, "", ""
        at = _micros(_value(document.body, self._step.time), self._step.time)
        group = json.dumps([_kept(_value(document.body, name)) for name in self._step.by])
        amounts = {}
        for aggregate in self._step.aggregates.values():
            if aggregate.field is not None:
                value = _value(document.body, aggregate.field)
                if aggregate.function in ("sum", "avg") and not isinstance(value, int | float | Decimal | None):
                    raise _UncountableError(f"field {aggregate.field!r} is a {type(value).__name__}, expected a number")
                amounts[aggregate.field] = _kept(value)
        return at, group, json.dumps(amounts)

    def _starts(self, at: int) -> Iterator[int]:
        last = at // self._every * self._every
        return iter(range(last, at - self._size, -self._every))

    def _put(self, document: Document, place: Place, amounts: str | None) -> None:
        if amounts is None:
            self._connection.execute(
                "delete from member where entity = ? and start = ? and grouping = ?", (document.key, *place)
            )
        else:
            self._connection.execute(
                "insert or replace into member values (?, ?, ?, ?)", (document.key, *place, amounts)
            )

    def _touch(self, document: Document, place: Place) -> None:
        self._connection.execute(
            """
            insert into window values (?, ?, ?, ?, ?, 1) on conflict do update set
              is_dirty = 1,
              committed_at = max(committed_at, excluded.committed_at),
              ordinal = iif(excluded.position = position, max(ordinal, excluded.ordinal),
                            iif(excluded.position > position, excluded.ordinal, ordinal)),
              position = max(position, excluded.position)
            """,
            (
                *place,
                document.version.position.value,
                document.version.ordinal,
                (document.committed_at - _EPOCH) // _MICROSECOND,
            ),
        )

    def _body(self, start: int, group: str) -> Mapping[str, Any] | None:
        rows = self._connection.execute(
            "select amounts from member where start = ? and grouping = ? order by entity", (start, group)
        ).fetchall()
        if not rows:
            return None
        amounts = [json.loads(row[0]) for row in rows]
        return {
            "window_id": _window_id(start, group),
            "window_start": moment(start),
            "window_end": moment(start + self._size),
            **dict(zip(self._step.by, map(_given, json.loads(group)), strict=True)),
            **{name: _aggregated(each, amounts) for name, each in self._step.aggregates.items()},
        }


class _UncountableError(Exception):
    pass


def _value(body: Mapping[str, Any], name: str) -> Any:
    if name not in body:
        raise _UncountableError(f"the document has no field {name!r}; it has {', '.join(map(str, body))}")
    return body[name]


def _micros(value: Any, name: str) -> int | None:
    match value:
        case None:
            return None
        case datetime():
            at = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        case date():
            at = datetime(value.year, value.month, value.day, tzinfo=UTC)
        case _:
            raise _UncountableError(f"field {name!r} is a {type(value).__name__}, expected a datetime or a date")
    return (at - _EPOCH) // _MICROSECOND


def _aggregated(aggregate: Aggregate, amounts: Sequence[Mapping[str, Any]]) -> Any:
    if aggregate.field is None:
        return len(amounts)
    values = [_given(each[aggregate.field]) for each in amounts if each[aggregate.field] is not None]
    if not values:
        return None
    functions: Mapping[str, Callable[[list[Any]], Any]] = {
        "sum": sum,
        "avg": lambda found: float(sum(found) / len(found)),
        "min": min,
        "max": max,
    }
    return functions[aggregate.function](values)


def _kept(value: Any) -> Any:
    """A value as JSON holds it, with its type where JSON has none."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Decimal():
            return {"decimal": str(value)}
        case datetime():
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
    raise _UncountableError(f"a {type(value).__name__} is neither grouped by nor aggregated")


def _given(kept: Any) -> Any:
    match kept:
        case {"decimal": text}:
            return Decimal(text)
        case {"datetime": text}:
            return datetime.fromisoformat(text)
        case {"date": text}:
            return date.fromisoformat(text)
    return kept


def _window_id(start: int, group: str) -> str:
    r"""The window's start and group in one text; a bar inside of a value stands behind a backslash.

    >>> _window_id(0, '["north|east", 7]')
    '1970-01-01T00:00:00+00:00|north\\|east|7'
    """
    parts = [str(_given(value)).replace("\\", "\\\\").replace("|", "\\|") for value in json.loads(group)]
    return "|".join([moment(start).isoformat(), *parts])
