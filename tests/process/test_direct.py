"""The direct plan: an app of one table gives what the plan that keeps every row gives, whatever happens."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from process.material import (
    INT,
    NULL_TEXT,
    TEXT,
    Change,
    Feed,
    TableSink,
    create,
    delete,
    read,
    table_schema,
    truncate,
    update,
)
from process.mortal import CRASH_POINTS, Mortal, quick_folder

from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.local import LocalLogReader
from deltaworks.log.memory import MemoryLog
from deltaworks.operate.sink_audit import differing
from deltaworks.position import Version
from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.direct.reducer import WIDE_BYTES
from deltaworks.process.entity import Entity
from deltaworks.process.ledger import ledger, left_runs
from deltaworks.process.ledger.ledger import LedgerReader
from deltaworks.process.ledger.left_keys import LeftKeys
from deltaworks.process.ledger.stood import Stood, stood
from deltaworks.process.requests import Kind, Request, Requests
from deltaworks.process.runner import STATE_FILE, Runner
from deltaworks.process.sink import Document
from deltaworks.store.lake_table import LakeTable
from deltaworks.testing.memory_sink import MemorySinkReader

MakeConfig = Callable[..., Config]

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT, note=NULL_TEXT)
studio = Source("studio")
Rows = dict[int, dict[str, Any]]


class Film(TypedDict):
    title: str
    status: str


def row_app() -> App:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])

    @app.filter
    def is_public(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    @app.transform
    def upper(film: Entity[Film]) -> dict[str, Any]:
        return {"name": film.after["title"].upper()}

    return app


def routed_app() -> App:
    app = row_app()

    @app.route
    def to_the_table(film: Entity[Film]) -> list[str]:
        return ["table"]

    return app


def arrow_app() -> App:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])

    @app.arrow
    def upper(films: pa.Table) -> pa.Table:
        kept = films.filter(pc.not_equal(films["status"], "draft"))
        return pa.table({"_key": kept["_key"], "name": pc.utf8_upper(kept["title"])})

    return app


def sql_app() -> App:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    app.sql("select _key, upper(title) as name from film where status <> 'draft'")
    return app


def service_app(troubles: list[str]) -> App:
    app = row_app()
    enriched = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    enriched.filter(app.steps[0].function)

    @enriched.enrich(into="loud", key=lambda film: film.after["title"], batch=2, retry=Backoff(first_s=0.0005))
    async def loud(titles: list[str]) -> dict[str, str]:
        trouble = troubles.pop() if troubles else ""
        if trouble == "retryable":
            raise RetryableError("away")
        if trouble == "terminal":
            raise ValueError("wrong")
        return {title: title.upper() for title in titles}

    @enriched.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        return {"name": film["loud"]}

    return enriched


def documents(rows: Rows) -> dict[int, Any]:
    return {key: {"name": row["title"].upper()} for key, row in rows.items() if row["status"] != "draft"}


small = st.integers(1, 4)
title = st.sampled_from(["a", "b", "w" * WIDE_BYTES])
operation = st.one_of(
    st.tuples(st.just("put"), small, title, st.sampled_from(["draft", "released"])),
    st.tuples(st.just("put"), small, title, st.sampled_from(["draft", "released"])),
    st.tuples(st.just("status only"), small, st.sampled_from(["draft", "released"])),
    st.tuples(st.just("drop"), small),
    st.tuples(st.just("move"), small, small),
    st.tuples(st.just("swap"), small, small),
    st.tuples(st.just("dump")),
    st.tuples(st.just("truncate")),
)
after_it = st.one_of(
    st.just(("drain",)),
    st.just(("read on",)),
    st.tuples(st.just("crash"), st.sampled_from(CRASH_POINTS), st.integers(1, 2)),
    st.tuples(st.just("trouble"), st.lists(st.sampled_from(["", "retryable", "terminal"]), min_size=1, max_size=3)),
)


def changes_of(rows: Rows, op: Any) -> Iterator[Change]:
    match op:
        case ("put", key, text, status):
            change = update if key in rows else create
            rows[key] = {"film_id": key, "title": text, "status": status, "note": None}
            yield change(FILM, **rows[key])
        case ("status only", key, status) if key in rows and len(rows[key]["title"]) >= WIDE_BYTES:
            rows[key]["status"] = status
            yield update(FILM, film_id=key, status=status, unchanged=["title", "note"])
        case ("drop", key) if key in rows:
            del rows[key]
            yield delete(FILM, film_id=key)
        case ("move", old, new) if old in rows and new not in rows:
            rows[new] = rows.pop(old) | {"film_id": new}
            yield update(FILM, **rows[new], old_key={"film_id": old})
        case ("swap", one, two) if one != two and {one, two} <= rows.keys():
            rows[one], rows[two] = rows[two] | {"film_id": one}, rows[one] | {"film_id": two}
            yield update(FILM, **rows[two], old_key={"film_id": one})
            yield update(FILM, **rows[one], old_key={"film_id": two})
        case ("dump",):
            yield from (read(FILM, **row) for row in rows.values())
        case ("truncate",):
            rows.clear()
            yield truncate(FILM)


class World(Mortal):
    def __init__(self, folder: Path, app: App, troubles: list[str]) -> None:
        super().__init__(folder)
        self.rows: Rows = {}
        self.troubles = troubles
        self.live(app)

    def step(self, event: Any) -> None:
        match event:
            case ("trouble", found):
                self.troubles.extend(found)
                self.runner.drain(patience_s=0)
            case _:
                super().step(event)

    def held(self) -> dict[Any, tuple[Version, Any]]:
        return self.sink.documents() if self.sink.file.exists() else {}

    @contextmanager
    def _ledger(self) -> Iterator[tuple[LedgerReader, LeftKeys]]:
        with LedgerReader(self.config.app_folder("films") / STATE_FILE) as reader:
            yield reader, LeftKeys.of([reader.left_tables()])

    def lost(self) -> list[str]:
        """What an audit of the sink would name."""
        stored = {
            key: Document(key=key, version=version, committed_at=datetime.now(UTC), body=body)
            for key, (version, body) in self.held().items()
        }
        with self._ledger() as (_, keys):
            return [keys.texts[place].as_py() for place in differing(keys, MemorySinkReader(stored), sink="table")]

    def left(self) -> dict[str, tuple[Version, bool]]:
        with self._ledger() as (_, keys):
            is_in = keys.are_in("table")
            return {text: (keys.version(at), bool(is_in[at])) for at, text in enumerate(keys.texts.to_pylist())}

    def stood(self) -> list[Stood]:
        with self._ledger() as (reader, keys):
            return stood(keys, [reader], entity="film", keeps_rows=reader.keeps_rows())

    def take_back(self, key: int) -> None:
        self._execute("update document set position = position - 1, ordinal = 99 where key = ?", key)

    def put_back(self, key: int, version: Version, body: Any) -> None:
        self._execute("delete from document where key = ?", key)
        assert self.lost() == ([] if body is None else [str(key)])
        self._execute(
            "insert into document (position, ordinal, body, key) values (?, ?, ?, ?)",
            version.position.value,
            version.ordinal,
            json.dumps(body),
            key,
        )

    def _execute(self, statement: str, *values: Any) -> None:
        with closing(sqlite3.connect(self.sink.file)) as connection, connection:
            connection.execute(statement, values)


@contextmanager
def world(app: App, troubles: list[str]) -> Iterator[World]:
    with quick_folder() as folder:
        found = World(folder, app, troubles)
        try:
            yield found
        finally:
            found.runner.close()


@pytest.mark.parametrize("form", ["rows", "routed", "arrow", "sql", "service"])
@settings(max_examples=50, deadline=None)
# A document left with the version of a change of nothing, before a swap made the app keep rows.
@example(
    events=[
        ([("put", 2, "a", "released"), ("put", 2, "a", "released")], ("drain",)),
        ([("put", 1, "a", "draft"), ("put", 3, "a", "draft"), ("swap", 1, 3)], ("drain",)),
    ],
    are_runs=False,
)
# The draft that a moved row became was taken for a row that is gone.
@example(events=[([("put", 2, "a", "draft"), ("move", 2, 1)], ("drain",))], are_runs=False)
@given(
    events=st.lists(st.tuples(st.lists(operation, min_size=1, max_size=4), after_it), min_size=1, max_size=8),
    are_runs=st.booleans(),
)
def test_every_form_ends_at_the_table_and_no_document_goes_back(form: str, events: list[Any], are_runs: bool) -> None:
    troubles: list[str] = []
    apps = {"rows": row_app, "routed": routed_app, "arrow": arrow_app, "sql": sql_app}
    apps["service"] = lambda: service_app(troubles)
    with pytest.MonkeyPatch.context() as patch, world(apps[form](), troubles) as it:
        if are_runs:
            patch.setattr(ledger, "ROW_BY_ROW", 0)
            patch.setattr(left_runs, "LOOSE_AT_LEAST", 3)
        for operations, event in events:
            changes = [change for each in operations for change in changes_of(it.rows, each)]
            if changes:
                it.feed.commit(*changes)
            # A document that went back would be raised by the sink.
            it.step(event)
            assert it.lost() == [], "an audit would raise a false alarm"
        it.troubles.clear()
        it.runner.retry_dead()
        report = it.runner.drain(patience_s=5)

        assert it.sink.bodies() == documents(it.rows)
        assert (report.held, report.dead) == (0, 0)
        assert it.left() == {str(key): (version, body is not None) for key, (version, body) in it.held().items()}
        # Whatever is taken out of the sink or set back in it is named.
        for key, (version, body) in it.held().items():
            it.take_back(key)
            assert it.lost() == ([] if body is None else [str(key)])
            it.put_back(key, version, body)
        assert sum(each.left for each in it.stood()) == len(it.sink.bodies())
        assert sum(each.filtered for each in it.stood()) == len(it.rows) - len(it.sink.bodies())


@pytest.mark.parametrize("make", [row_app, routed_app, arrow_app, sql_app])
def test_rows_that_are_gone_are_told_from_those_that_were_filtered_out(make: Callable[[], App]) -> None:
    with world(make(), []) as it:
        it.feed.commit(*(create(FILM, film_id=key, title="a", status="released", note=None) for key in range(5)))
        it.runner.drain()
        it.feed.commit(
            *(delete(FILM, film_id=key) for key in (0, 1)),
            update(FILM, film_id=2, title="a", status="draft", note=None),
            update(FILM, film_id=3, title="b", status="released", note=None),
        )
        it.runner.drain()
        found = it.stood()
        totals = [sum(getattr(each, name) for each in found) for name in ("left", "filtered", "gone")]
        assert totals == [2, 1, 2]


@pytest.mark.parametrize("form", ["arrow", "sql"])
def test_columns_go_straight_into_the_log_of_a_lake_table(
    form: str, make_config: MakeConfig, feed: Feed, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one document is made of a row on the way, and the table is what rows would have made it."""
    made = {"film_id": int, "name": str}
    columns = {"arrow": arrow_app, "sql": sql_app}[form]()
    columns.sink(LakeTable("named", schema=made))
    monkeypatch.setattr(DocumentBatch, "documents", lambda _: pytest.fail("a row became a document"))
    feed.commit(
        *(create(FILM, **film(key, f"film {key}", "draft" if key % 3 == 0 else "released")) for key in range(9))
    )
    with Runner.open(columns, config=make_config(), name="films", log=log.reader()) as runner:
        assert runner.drain().documents == 6
        feed.commit(delete(FILM, film_id=1), update(FILM, **film(2, "again")), update(FILM, **film(4, "x", "draft")))
        runner.drain()
    found: dict[int, Any] = {}
    for group in LocalLogReader(make_config().log_folder("films")).read(after_sequence=-1):
        for row in (row for batch in group.batches for row in batch.rows.to_pylist()):
            found[row["film_id"]] = None if row["_op"] == "d" else row["name"]
    assert found == {0: None, 1: None, 2: "AGAIN", 3: None, 4: None, 5: "FILM 5", 6: None, 7: "FILM 7", 8: "FILM 8"}


@pytest.fixture
def open_runner(make_config: MakeConfig, log: MemoryLog, sink: TableSink) -> Callable[[App], Runner]:
    def run(app: App) -> Runner:
        if not app.sinks:
            app.sink(sink)
        return Runner.open(app, config=make_config(), name="films", log=log.reader())

    return run


def film(key: int, text: str = "alien", status: str = "released") -> dict[str, Any]:
    return {"film_id": key, "title": text, "status": status, "note": None}


def stored(runner: Runner) -> int:
    return int(runner._state.rows.has_any(row_app().entity))


def test_no_row_is_kept_but_of_what_waits_and_what_a_source_may_leave_out(
    feed: Feed, sink: TableSink, open_runner: Callable[[App], Runner]
) -> None:
    with open_runner(row_app()) as runner:
        feed.commit(*(create(FILM, **film(key)) for key in range(50)))
        runner.drain()
        assert (len(sink.bodies()), stored(runner)) == (50, 0)

        feed.commit(create(FILM, **film(77, "w" * WIDE_BYTES)))
        runner.drain()
        assert stored(runner) == 1
        feed.commit(update(FILM, film_id=77, status="old", unchanged=["title"]))
        runner.drain()
        assert sink.bodies()[77] == {"name": "W" * WIDE_BYTES}
        feed.commit(update(FILM, **film(77, "narrow")))
        runner.drain()
        assert stored(runner) == 0


def test_a_truncate_takes_every_document_with_it(
    feed: Feed, sink: TableSink, open_runner: Callable[[App], Runner]
) -> None:
    with open_runner(row_app()) as runner:
        feed.commit(*(create(FILM, **film(key)) for key in range(5)))
        runner.drain()
        feed.commit(truncate(FILM), create(FILM, **film(9)))
        runner.drain()
        assert sink.bodies().keys() == {9}
    with open_runner(row_app()) as runner:
        feed.commit(truncate(FILM))
        runner.drain()
    assert sink.bodies() == {}


def test_all_entities_are_made_anew_when_asked_for(
    feed: Feed, sink: TableSink, open_runner: Callable[[App], Runner]
) -> None:
    app = row_app()
    with open_runner(app) as runner:
        feed.commit(*(create(FILM, **film(key)) for key in range(5)))
        runner.drain()
        Requests.of(runner.folder).ask(Request.new(Kind.REPROCESS))
        assert runner.drain().documents == 5


def test_text_keys_and_many_groups_in_one_range(
    feed: Feed, sink: TableSink, open_runner: Callable[[App], Runner]
) -> None:
    table = table_schema("word", "word", word=TEXT, title=TEXT)

    class Word(TypedDict):
        title: str

    app = App("films", key="word", sources=[studio.table("word", schema=Word)])
    with open_runner(app) as runner:
        for number in range(20):
            feed.commit(create(table, word=f"k{number % 7}", title=f"t{number}"))
        report = runner.drain()
    assert (report.changes, report.entities) == (20, 7)
    assert sink.bodies() == {f"k{number % 7}": {"title": f"t{number}"} for number in range(13, 20)}
