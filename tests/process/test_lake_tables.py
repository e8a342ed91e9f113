"""Two lake tables of one app: they share its log, and what came of a change is in both or in none."""

from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from process.material import INT, TEXT, Feed, create, delete, table_schema, update

from deltaworks import faults, operate
from deltaworks.config import Config
from deltaworks.log.change_log import FencedError
from deltaworks.log.local import LocalLogReader
from deltaworks.log.memory import MemoryLog
from deltaworks.operate.lake import open_lake
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.process.runner import Runner
from deltaworks.store.lake_table import LakeTable
from deltaworks.testing.memory_sink import MemorySink

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
NAMES = ("search", "archive")


class Film(TypedDict):
    title: str


class Row(TypedDict):
    film_id: int
    title: str


class Crash(BaseException):
    pass


def films_app() -> App:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

    @films.transform
    def row(film: Entity[Film]) -> Row:
        return {"film_id": film.key, "title": film.after["title"]}

    @films.route
    def by_title(film: Row) -> list[str]:
        return ["search", "archive"] if film["title"] < "m" else ["archive"]

    films.sink(LakeTable("search", schema=Row))
    # Something else in between, so that a crash can come after one table's flush and before the other's.
    films.sink(MemorySink("between"))
    films.sink(LakeTable("archive", schema=Row))
    return films


@pytest.mark.parametrize(
    "crash_at", [None, "process.after_write", "process.after_flush", "process.before_settle_commit"]
)
def test_they_are_loaded_together_and_end_as_the_reference(
    crash_at: str | None, make_config: Callable[..., Config], feed: Feed, log: MemoryLog
) -> None:
    config = make_config()

    def run() -> None:
        with Runner.open(films_app(), config=config, name="films", log=log.reader()) as runner:
            runner.drain(patience_s=0)

    def crash() -> None:
        faults.disarm()
        raise Crash

    feed.commit(*(create(FILM, film_id=number, title="abc"[number % 3] * 3) for number in range(9)))
    run()
    feed.commit(update(FILM, film_id=1, title="zzz"), delete(FILM, film_id=2), create(FILM, film_id=9, title="new"))
    if crash_at is not None:
        faults.arm(crash_at, crash)
        with pytest.raises(Crash):
            run()
    run()
    operate.load(config, "films")

    expected = {number: "abc"[number % 3] * 3 for number in range(9) if number not in (1, 2)} | {1: "zzz", 9: "new"}
    with open_lake(config) as lake:
        found = {
            name: dict(lake.connection.execute(f"select film_id, title from lake.films.{name}").fetchall())
            for name in NAMES
        }
    assert found["archive"] == expected
    assert found["search"] == {key: title for key, title in expected.items() if title < "m"}
    for group in LocalLogReader(config.log_folder("films")).read(after_sequence=-1):
        versions: dict[str, Any] = {
            batch.schema.name.short: batch.rows.select(["_commit", "_ordinal", "film_id"]).to_pylist()
            for batch in group.batches
        }
        assert versions.get("search") == versions.get("archive"), "a document is in one table and not in the other"


def test_another_process_is_still_refused(make_config: Callable[..., Config], log: MemoryLog) -> None:
    config = make_config()
    with (
        Runner.open(films_app(), config=config, name="films", log=log.reader()),
        pytest.raises(FencedError),
    ):
        LakeTable("search", schema=Row).open(app="films", key="film_id", config=config)
