"""The runner from the log to a sink."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, PERSON, ROLE, Film, film_app
from process.material import (
    INT,
    TEXT,
    Feed,
    TableSink,
    create,
    delete,
    following,
    read,
    table_schema,
    update,
    wait_until,
)

from deltaworks.config import Config
from deltaworks.log.change_log import Group
from deltaworks.log.memory import MemoryLog
from deltaworks.position import Lsn
from deltaworks.process.app import App, Source
from deltaworks.process.client import ClientNotOpenedError
from deltaworks.process.place import AppHeldError
from deltaworks.process.runner import Runner
from deltaworks.process.source import SchemaMismatchError

MakeConfig = Callable[..., Config]

studio = Source("studio")


@pytest.fixture
def runner(sink: TableSink, make_config: MakeConfig, service: FaultyService, log: MemoryLog) -> Any:
    with Runner.open(film_app(sink), config=make_config(url=service.url), name="films", log=log.reader()) as runner:
        yield runner


def test_a_document_has_the_rows_of_all_tables_and_the_answers_of_the_service(
    runner: Runner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "Ada", 2: "Bo"}
    feed.commit(create(FILM, film_id=7, title="Alien", status="released"))
    feed.commit(create(ROLE, role_id=1, film_id=7, person_id=1), create(ROLE, role_id=2, film_id=7, person_id=2))

    report = runner.drain()

    assert sink.bodies() == {7: {"title": "Alien", "cast": ["Ada", "Bo"]}}
    assert (report.changes, report.documents, report.enriched, report.position.value) == (3, 1, 2, 20)


def test_a_change_of_a_looked_up_row_makes_every_entity_that_used_it_anew(
    runner: Runner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "Ada"}
    for film_id in (7, 8, 9):
        feed.commit(create(FILM, film_id=film_id, title="Alien", status="released"))
    feed.commit(create(ROLE, role_id=1, film_id=7, person_id=1), create(ROLE, role_id=2, film_id=8, person_id=1))
    runner.drain()
    before = sink.documents()

    service.names = {1: "Ada Byron"}
    position = feed.commit(update(PERSON, person_id=1, name="Ada Byron"))
    runner.drain()

    assert [sink.bodies()[film_id]["cast"] for film_id in (7, 8)] == [["Ada Byron"], ["Ada Byron"]]
    assert {sink.documents()[film_id][0].position.value for film_id in (7, 8)} == {position}
    assert sink.documents()[9] == before[9]


def test_an_entity_that_is_filtered_out_or_deleted_leaves_the_sink(runner: Runner, feed: Feed, sink: TableSink) -> None:
    for film_id in (7, 8, 9):
        feed.commit(create(FILM, film_id=film_id, title="Alien", status="released"))
    runner.drain()

    feed.commit(update(FILM, film_id=7, title="Alien", status="draft"), delete(FILM, film_id=8))
    report = runner.drain()

    assert sink.bodies().keys() == {9}
    assert (report.removed, report.filtered) == (2, 1)


def test_a_change_of_a_column_that_the_app_does_not_read_makes_no_document(
    runner: Runner, feed: Feed, sink: TableSink
) -> None:
    feed.commit(create(FILM, film_id=7, title="Alien", status="released"))
    runner.drain()

    feed.commit(update(FILM, film_id=7, title="Alien", status="released", note="new"))

    assert runner.drain().entities == 0


def test_a_dumps_read_makes_the_document_again_although_nothing_changed(runner: Runner, feed: Feed) -> None:
    feed.commit(create(FILM, film_id=7, title="Alien", status="released"))
    runner.drain()

    feed.commit(read(FILM, film_id=7, title="Alien", status="released"))

    assert runner.drain().documents == 1


def test_a_change_with_values_that_were_not_sent_waits_for_the_dump_of_its_row(
    runner: Runner, feed: Feed, sink: TableSink
) -> None:
    feed.commit(update(FILM, film_id=7, title="Alien", unchanged=["status"]))
    report = runner.drain()
    assert (report.incomplete, report.documents) == (1, 0)

    feed.commit(read(FILM, film_id=7, title="Alien", status="released"))
    runner.drain()

    assert sink.bodies() == {7: {"title": "Alien", "cast": []}}


def test_sinks_hear_of_a_position_that_came_with_nothing_to_write(runner: Runner, feed: Feed, log: MemoryLog) -> None:
    feed.writer.append(Group(batches=(), position=Lsn(500)))

    assert runner.drain().position == Lsn(500)


def test_a_second_runner_is_refused_with_the_process_that_runs(
    runner: Runner, sink: TableSink, make_config: MakeConfig, log: MemoryLog
) -> None:
    with pytest.raises(AppHeldError, match=str(os.getpid())):
        Runner.open(film_app(sink), config=make_config(url="http://127.0.0.1:1"), name="films", log=log.reader())


def test_two_apps_over_one_log_do_not_meet(
    runner: Runner, feed: Feed, log: MemoryLog, tmp_path: Path, make_config: MakeConfig, service: FaultyService
) -> None:
    other_sink = TableSink(tmp_path / "other.sqlite")
    config = make_config("other", url=service.url)
    with Runner.open(film_app(other_sink), config=config, name="other", log=log.reader()) as other:
        feed.commit(create(FILM, film_id=7, title="Alien", status="released"))

        assert (runner.drain().documents, other.drain().documents) == (1, 1)


def test_a_setting_that_a_client_needs_is_asked_for_by_name(
    sink: TableSink, make_config: MakeConfig, log: MemoryLog
) -> None:
    with pytest.raises(ClientNotOpenedError, match=r"no setting 'url'; known: none.*apps\.films\.settings"):
        Runner.open(film_app(sink), config=make_config(), name="films", log=log.reader())


def test_an_app_that_reads_more_columns_reads_the_log_from_its_start(
    feed: Feed, sink: TableSink, make_config: MakeConfig, log: MemoryLog
) -> None:
    class FilmWithNote(Film):
        note: str | None

    def app_of(schema: Any) -> App:
        app = App("films", key="film_id", sources=[studio.table("film", schema=schema)])
        app.sink(sink)
        return app

    feed.commit(create(FILM, film_id=7, title="Alien", status="released", note="in space"))
    with Runner.open(app_of(Film), config=make_config(), name="films", log=log.reader()) as runner:
        runner.drain()
    with Runner.open(app_of(FilmWithNote), config=make_config(), name="films", log=log.reader()) as runner:
        runner.drain()

    assert sink.bodies()[7]["note"] == "in space"


def test_a_column_that_was_removed_stops_the_app_before_any_row_after_it_is_read(
    runner: Runner, feed: Feed, sink: TableSink
) -> None:
    feed.commit(create(FILM, film_id=7, title="Alien", status="released"))
    runner.drain()
    narrow = table_schema("film", "film_id", film_id=INT, title=TEXT)
    feed.commit(create(narrow, film_id=8, title="Aliens"))

    with pytest.raises(SchemaMismatchError, match=r"film\.status: declared str, found no such column"):
        runner.drain()

    assert sink.bodies().keys() == {7}


def test_a_wrong_type_is_refused_before_the_first_change_is_read(
    feed: Feed, sink: TableSink, make_config: MakeConfig, log: MemoryLog
) -> None:
    wrong = table_schema("role", "role_id", role_id=INT, film_id=INT, person_id=TEXT)
    feed.commit(create(FILM, film_id=7, title="Alien", status="released"))
    feed.commit(create(wrong, role_id=1, film_id=7, person_id="one"))

    with pytest.raises(SchemaMismatchError, match=r"role\.person_id: declared int, found text"):
        Runner.open(film_app(sink), config=make_config(url="http://none"), name="films", log=log.reader())

    assert not sink.file.exists()


def test_progress_ends_where_the_work_does(runner: Runner, feed: Feed) -> None:
    seen: list[tuple[int, int]] = []
    feed.commit(*(create(FILM, film_id=number, title="Alien", status="released") for number in range(50)))

    runner.drain(on_progress=lambda done, total: seen.append((done, total)))

    assert seen[-1] == (100, 100)


def test_follow_takes_what_comes_until_it_is_stopped(
    runner: Runner, feed: Feed, sink: TableSink, service: FaultyService
) -> None:
    with following(runner) as followed:
        for film_id in range(5):
            feed.commit(create(FILM, film_id=film_id, title="Alien", status="released"))
            wait_until(lambda wanted=film_id + 1: len(sink.bodies()) == wanted)
    report = followed.result()

    assert report.documents == 5
    assert report.log_lag.count == 5
