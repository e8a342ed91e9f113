"""The steps of the DSL over a log: several that make a document, tables, routes, what left already, windows."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process.material import INT, NULL_INT, TEXT, Feed, TableSink, create, delete, read, table_schema, update
from process.mortal import quick_folder

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import App, Source, count, least, mean, most, total
from deltaworks.process.entity import Entity
from deltaworks.process.runner import Runner

MakeConfig = Callable[..., Config]

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT)
SALE = table_schema(
    "sale", "sale_id", sale_id=INT, shop=TEXT, amount=NULL_INT, sold_at=(pa.timestamp("us", "UTC"), "timestamptz", True)
)
studio = Source("studio")
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Film(TypedDict):
    title: str
    status: str


class Sale(TypedDict):
    shop: str
    amount: int | None
    sold_at: datetime | None


@pytest.fixture
def app(sink: TableSink) -> App:
    found = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    found.sink(sink)
    return found


@pytest.fixture
def sales(sink: TableSink) -> App:
    found = App("films", key="sale_id", sources=[studio.table("sale", schema=Sale)])
    found.sink(sink)
    return found


@pytest.fixture
def drain(make_config: MakeConfig, log: MemoryLog) -> Callable[..., Any]:
    def run(app: App) -> Any:
        with Runner.open(app, config=make_config(), name="films", log=log.reader()) as runner:
            return runner.drain(patience_s=0), runner.dead()

    return run


def film(number: int, title: str = "Alien", status: str = "released") -> Any:
    return create(FILM, film_id=number, title=title, status=status)


def sale(number: int, shop: str, amount: int | None, *, minutes: float) -> dict[str, Any]:
    return {"sale_id": number, "shop": shop, "amount": amount, "sold_at": NOON + timedelta(minutes=minutes)}


def test_steps_that_make_a_document_follow_each_other_and_a_filter_may_stand_between(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    @app.transform
    def loud(film: Entity[Film]) -> dict[str, Any]:
        return {"name": film.after["title"].upper(), "status": film.after["status"]}

    @app.filter
    def is_long(document: dict[str, Any]) -> bool:
        return len(document["name"]) > 3

    @app.transform
    def measured(document: dict[str, Any]) -> dict[str, Any]:
        return {**document, "length": len(document["name"])}

    app.project("length", title="name")
    feed.commit(film(1), film(2, "Up"))
    report, _ = drain(app)

    assert sink.bodies() == {1: {"length": 5, "title": "ALIEN"}}
    assert report.filtered == 1


def test_a_projection_alone_makes_the_document(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    app.project(name="title")
    feed.commit(film(1))
    drain(app)
    assert sink.bodies() == {1: {"name": "Alien"}}


def test_the_row_form_an_arrow_step_and_a_query_make_the_same_documents(
    feed: Feed, tmp_path: Path, make_config: MakeConfig, log: MemoryLog
) -> None:
    apps = {name: App(name, key="film_id", sources=[studio.table("film", schema=Film)]) for name in ("a", "b", "c")}

    @apps["a"].filter
    def is_public(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    @apps["a"].transform
    def upper(film: Entity[Film]) -> dict[str, Any]:
        return {"name": film.after["title"].upper()}

    @apps["b"].arrow
    def upper_table(films: pa.Table) -> pa.Table:
        kept = films.filter(pc.not_equal(films["status"], "draft"))
        return pa.table({"_key": kept["_key"], "name": pc.utf8_upper(kept["title"])})

    apps["c"].sql("select _key, upper(title) as name from film where status <> 'draft'")
    feed.commit(film(1), film(2, status="draft"), film(3, "Up"))
    feed.commit(delete(FILM, film_id=1), update(FILM, film_id=3, title="Heat", status="released"))
    for name, app in apps.items():
        sink = TableSink(tmp_path / f"{name}.sqlite")
        app.sink(sink)
        with Runner.open(app, config=make_config(name), name=name, log=log.reader()) as runner:
            report = runner.drain()
        assert sink.bodies() == {3: {"name": "HEAT"}}, name
        assert (report.documents, report.filtered) == (1, 1)


def test_an_arrow_step_that_raises_makes_dead_letters_of_the_rows_at_fault_alone(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    @app.arrow
    def numbers(films: pa.Table) -> pa.Table:
        return films.set_column(1, "title", films["title"].cast(pa.int64()))

    feed.commit(*(film(n, "x" if n in (3, 11) else str(n)) for n in range(1, 15)))
    _, letters = drain(app)

    assert sink.bodies()[2]["title"] == 2
    assert sorted(letter.key for letter in letters) == [3, 11]
    assert all(letter.error.startswith(f"ArrowInvalid at {__file__}:") for letter in letters)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lambda films: 1, "returned int, expected an Arrow table"),
        (lambda films: films.drop_columns(["_key"]), "returned a table without _key"),
        (lambda films: pa.concat_tables([films, films]), "returned a key twice"),
        (lambda films: pa.table({"_key": [99]}), "returned a key that it was not given"),
    ],
)
def test_an_arrow_step_that_returns_no_documents_is_told_so(
    app: App, feed: Feed, drain: Callable[..., Any], made: Any, fault: str
) -> None:
    app.arrow(made)
    feed.commit(film(1))
    _, [letter] = drain(app)
    assert letter.error.startswith(fault)


def test_a_document_goes_to_the_sinks_that_a_route_names_and_leaves_the_others(
    app: App, feed: Feed, sink: TableSink, tmp_path: Path, drain: Callable[..., Any]
) -> None:
    class Other(TableSink):
        name = "archive"

    archive = Other(tmp_path / "archive.sqlite")
    app.sink(archive)

    @app.route
    def where(film: Entity[Film]) -> list[str]:
        return {"released": ["table", "archive"], "old": ["archive"], "draft": [], "odd": ["nowhere"]}[
            film.after["status"]
        ]

    feed.commit(film(1), film(2), film(3, status="old"), film(4, status="odd"))
    _, [letter] = drain(app)
    assert (sink.bodies().keys(), archive.bodies().keys()) == ({1, 2}, {1, 2, 3})
    assert "returned a name of no sink; known: archive, table" in letter.error

    feed.commit(*(update(FILM, film_id=n, title="a", status=status) for n, status in ((1, "old"), (2, "draft"))))
    drain(app)
    assert (sink.bodies().keys(), archive.bodies().keys()) == (set(), {1, 3})


def test_a_document_equal_to_the_one_that_left_last_is_not_written_again(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    app.project("title", "status")
    app.dedup("title")
    first = feed.commit(film(1))
    drain(app)
    feed.commit(update(FILM, film_id=1, title="Alien", status="old"))
    drain(app)
    assert sink.documents()[1][0].position.value == first

    feed.commit(update(FILM, film_id=1, title="Aliens", status="old"))
    drain(app)
    assert sink.bodies() == {1: {"title": "Aliens", "status": "old"}}

    last = feed.commit(read(FILM, film_id=1, title="Aliens", status="old"))
    drain(app)
    assert sink.documents()[1][0].position.value == last, "a dump's read repairs"


def test_a_document_is_written_although_it_equals_the_last_known_one_after_a_crash_with_another(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    class Death(BaseException):
        pass

    def die() -> None:
        raise Death

    app.project("title")
    app.dedup()
    feed.commit(film(1, "Alien"))
    drain(app)
    feed.commit(update(FILM, film_id=1, title="Heat", status="released"))
    faults.arm("process.after_flush", die)
    with pytest.raises(Death):
        drain(app)
    faults.disarm()
    assert sink.bodies() == {1: {"title": "Heat"}}

    feed.commit(update(FILM, film_id=1, title="Alien", status="released"))
    drain(app)
    assert sink.bodies() == {1: {"title": "Alien"}}


def test_a_window_is_the_group_by_of_what_is_there_now(
    sales: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    sales.window(
        time="sold_at",
        size=timedelta(hours=1),
        by="shop",
        sales=count(),
        revenue=total("amount"),
        average=mean("amount"),
        smallest=least("amount"),
        last=most("sold_at"),
    )
    feed.commit(*(create(SALE, **sale(n, "north", n * 10, minutes=n)) for n in (1, 2)))
    feed.commit(create(SALE, **sale(3, "south|east", None, minutes=61)))
    drain(sales)
    north, south = "2026-03-01T12:00:00+00:00|north", "2026-03-01T13:00:00+00:00|south\\|east"
    assert sink.bodies() == {
        north: {
            "window_id": north,
            "window_start": str(NOON),
            "window_end": str(NOON + timedelta(hours=1)),
            "shop": "north",
            "sales": 2,
            "revenue": 30,
            "average": 15.0,
            "smallest": 10,
            "last": str(NOON + timedelta(minutes=2)),
        },
        south: sink.bodies()[south] | {"sales": 1, "revenue": None, "average": None},
    }

    moved = feed.commit(update(SALE, **sale(1, "south|east", 5, minutes=61)))
    drain(sales)
    assert (sink.bodies()[north]["sales"], sink.bodies()[south]["revenue"]) == (1, 5)
    assert sink.documents()[north][0].position.value == moved

    feed.commit(delete(SALE, sale_id=2))
    drain(sales)
    assert sink.bodies().keys() == {south}


def test_what_comes_after_a_window_closed_is_late_until_a_dump_reads_it(
    sales: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    hour, minute = timedelta(hours=1), timedelta(minutes=1)
    sales.window(time="sold_at", size=hour, lateness=10 * minute, when_closed=True, sales=count())

    def counts() -> list[int]:
        return [body["sales"] for _, body in sorted(sink.bodies().items())]

    feed.commit(create(SALE, **sale(1, "north", 1, minutes=30)))
    feed.commit(create(SALE, **sale(2, "north", 1, minutes=69)))
    drain(sales)
    assert counts() == [], "no window is closed yet"
    feed.commit(create(SALE, **sale(3, "north", 1, minutes=31)))
    feed.commit(create(SALE, **sale(4, "north", 1, minutes=70)))
    drain(sales)
    assert counts() == [2]
    feed.commit(create(SALE, **sale(5, "north", 1, minutes=32)))
    drain(sales)
    assert counts() == [2], "late"
    feed.commit(read(SALE, **sale(5, "north", 1, minutes=32)))
    drain(sales)
    assert counts() == [3], "a dump counts it"


def test_a_document_that_cannot_be_counted_is_a_dead_letter(
    sales: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    sales.window(time="shop", size=timedelta(hours=1), sales=count())
    feed.commit(create(SALE, **sale(1, "north", 1, minutes=30)))
    _, [letter] = drain(sales)
    assert letter.error.startswith("field 'shop' is a str, expected a datetime or a date")
    assert __file__ in letter.error


sale_event = st.tuples(
    st.integers(1, 4), st.sampled_from(["n", "s"]), st.none() | st.integers(0, 9), st.sampled_from([1, 29, 31, 61, 95])
)
crash_points = st.sampled_from(["process.after_fold", "process.after_write", "process.after_flush", None, None])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.none() | sale_event, crash_points), min_size=1, max_size=10))
def test_after_any_changes_and_crashes_windows_equal_the_group_by(events: list[Any]) -> None:
    with quick_folder() as folder:
        check_windows(folder, events)


def check_windows(folder: Path, events: list[Any]) -> None:
    log, sink = MemoryLog(), TableSink(folder / "sink.sqlite")
    feed = Feed(log.writer())
    config = Config.model_validate(
        {
            "home": folder,
            "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["sale"]}},
            "apps": {"sales": {"module": "none:none", "source": "studio"}},
        }
    )
    app = App("sales", key="sale_id", sources=[studio.table("sale", schema=Sale)])
    app.window(
        time="sold_at",
        size=timedelta(hours=1),
        every=timedelta(minutes=30),
        by="shop",
        sales=count(),
        revenue=total("amount"),
    )
    app.sink(sink)
    rows: dict[int, dict[str, Any]] = {}

    class Death(BaseException):
        pass

    def die() -> None:
        raise Death

    for event, point in events:
        if event is None:
            feed.commit(
                *(delete(SALE, sale_id=number) for number in list(rows)[:1]), read(SALE, **sale(9, "n", 1, minutes=1))
            )
            rows.pop(next(iter(rows), 0), None)
            rows[9] = sale(9, "n", 1, minutes=1)
        else:
            number, shop, amount, minutes = event
            change = update if number in rows else create
            rows[number] = sale(number, shop, amount, minutes=minutes)
            feed.commit(change(SALE, **rows[number]))
        if point is not None:
            faults.arm(point, die)
        try:
            with Runner.open(app, config=config, name="sales", log=log.reader()) as runner:
                runner.drain(patience_s=0)
        except Death:
            pass
        finally:
            faults.disarm()
    with Runner.open(app, config=config, name="sales", log=log.reader()) as runner:
        runner.drain()

    expected: dict[tuple[str, str], list[Any]] = {}
    for row in rows.values():
        for half_hour in range(-2, 4):
            start = NOON + timedelta(minutes=30 * half_hour)
            if start <= row["sold_at"] < start + timedelta(hours=1):
                expected.setdefault((str(start), row["shop"]), []).append(row["amount"])
    assert {
        (body["window_start"], body["shop"]): (body["sales"], body["revenue"]) for body in sink.bodies().values()
    } == {
        place: (len(amounts), sum(known) if (known := [a for a in amounts if a is not None]) else None)
        for place, amounts in expected.items()
    }
