"""A replay of an app: equal where the app is the same, and exactly the changed keys where it is not."""

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner, Result

from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config, load
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.until import LogUntil, last_group_at, position_before
from deltaworks.position import Lsn
from deltaworks.process.app import App, Source, count
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.sink import open_reader
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search.spec import SearchIndex
from deltaworks.testing.changes import EPOCH, Feed, create, delete, table_schema, update

INT, TEXT = (pa.int32(), "integer", False), (pa.string(), "text", False)
FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, year=INT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=INT)
FILMS = range(1, 41)


class Film(TypedDict):
    film_id: int
    title: str
    year: int


class Role(TypedDict):
    role_id: int


class Shown(TypedDict):
    film_id: int
    title: str
    roles: int


class Films:
    """The module of an app, which a test edits; `told` are transitions that it was told of."""

    def __init__(self, *, reads_roles: bool) -> None:
        self.reads_roles = reads_roles
        self.told: list[int] = []
        self.title: Callable[[Film], str] = lambda film: film["title"]
        self.is_shown: Callable[[Film], bool] = lambda film: film["year"] >= 1950

    def app(self) -> App:
        studio = Source("studio")
        film, role = studio.table("film", schema=Film), studio.table("role", schema=Role)
        films = App("films", key="film_id", sources=[film, role] if self.reads_roles else [film])

        @films.filter
        def is_shown(film: Entity[Film]) -> bool:
            return self.is_shown(film.after)

        @films.transform
        def document(film: Entity[Film]) -> Shown:
            roles = len(film.rows(role)) if self.reads_roles else 0
            return {"film_id": film.after["film_id"], "title": self.title(film.after), "roles": roles}

        if self.reads_roles:

            @films.on_change("year")
            def moved(turn: Transition[Film]) -> None:
                self.told.append(turn.key)

        films.sink(SearchIndex("films", text={"title": 1.0}))
        films.sink(LakeTable("films", schema=Shown))
        return films


@pytest.fixture(params=[True, False], ids=["rows", "direct"])
def films(request: pytest.FixtureRequest) -> Films:
    return Films(reads_roles=request.param)


@pytest.fixture
def path(tmp_path: Path, films: Films, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty films with a role each, processed; half of them loaded into the lake; some changed since."""
    monkeypatch.setitem(sys.modules, "replayed_films", ModuleType("replayed_films"))
    edit(films)
    path = tmp_path / "deltaworks.yaml"
    app = {"module": "replayed_films:films", "source": "studio"}
    source = {"kind": "postgres", "dsn": "none", "tables": ["film", "role"]}
    path.write_text(yaml.safe_dump({"home": "home", "sources": {"studio": source}, "apps": {"films": app}}))
    config = load(path, environment={})
    with LocalLogWriter.open(config.log_folder("studio")) as writer:
        feed = Feed(writer)
        for number in FILMS:
            feed.commit(
                create(FILM, film_id=number, title=f"film {number}", year=1930 + number),
                create(ROLE, role_id=number, film_id=number),
            )
            if number == 20:
                operate.process(config, "films")
                operate.load(config, "films")
        # Position 410 to 440.
        feed.commit(update(FILM, film_id=30, title="thirty", year=1960))
        feed.commit(delete(FILM, film_id=31), update(FILM, film_id=32, title="film 32", year=1940))
        feed.commit(create(ROLE, role_id=100, film_id=25))
        feed.commit(update(FILM, film_id=5, title="five", year=1955))
    operate.process(config, "films")
    films.told.clear()
    return path


@pytest.fixture
def config(path: Path) -> Config:
    return load(path, environment={})


def edit(films: Films) -> None:
    """Let the module be as the class says now."""
    sys.modules["replayed_films"].films = films.app()  # type: ignore[attr-defined]


def replay(path: Path, *options: str) -> Result:
    return CliRunner().invoke(command_line, ["replay", "films", *options, "--config", str(path)])


def report(done: Result) -> dict[str, dict[str, object]]:
    # Outside of the command itself, what is logged is in the output too.
    text = done.output[done.output.index("{\n") :]
    return {sink["sink"]: sink for sink in json.loads(text)["sinks"]}


def versions(config: Config, films: Films) -> list[set[tuple[str, Lsn]]]:
    """What each sink holds, by key and position: a lake that was loaded keeps neither ordinals nor deletes."""
    readers = [open_reader(spec, app="films", key="film_id", config=config) for spec in films.app().sinks]
    return [
        {(each.key, each.version.position) for each in reader.versions() if not each.is_deleted} for reader in readers
    ]


def test_an_unchanged_app_replays_equal_from_everywhere(path: Path, films: Films) -> None:
    for start in ("0/0", "0/BE", str(Lsn(420)), (EPOCH + timedelta(seconds=415)).isoformat()):
        done = replay(path, "--from", start)
        assert done.exit_code == 0, (start, done.output, done.exception)
        verdict = "films: the new version may replace the old one: it makes the same documents"
        assert done.output.splitlines()[-1] == verdict
    # What an app told of when it happened is not told again.
    assert films.told == []
    done = replay(path, "--from", "1/0")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "films: nothing was compared: no entity changed after the start"


def test_a_changed_app_shows_exactly_the_keys_that_it_changes(path: Path, config: Config, films: Films) -> None:
    before = versions(config, films)
    films.title = lambda film: film["title"].upper() if film["film_id"] in {33, 34} else film["title"]
    films.is_shown = lambda film: (film["year"] >= 1950 and film["film_id"] != 35) or film["film_id"] == 7
    edit(films)

    done = replay(path, "--json")
    assert done.exit_code == 1, (done.output, done.exception)
    for sink in report(done).values():
        examples = {"changed": ["33", "34"], "only_old": ["35"], "only_new": ["7"]}
        assert sink["examples"] == examples, sink
        # Two changed documents each count once on each side, the others on one.
        assert (sink["changed"], sink["only_old"], sink["only_new"], sink["multiset"]) == (2, 1, 1, 6)
    assert json.loads(done.output)["verdict"].startswith("8 keys differ")
    # The app's own sinks are as they were.
    assert versions(config, films) == before

    # Of what changed after position 420, which is film 25's role (not read by all) and film 5.
    late = replay(path, "--json", "--from", str(Lsn(420)))
    assert late.exit_code == 0
    assert {sink["new"] for sink in report(late).values()} == {2 if films.reads_roles else 1}


def test_a_replay_into_the_same_sinks_changes_nothing_of_an_unchanged_app(
    path: Path, config: Config, films: Films
) -> None:
    before = versions(config, films)
    done = replay(path, "--into", "same")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.splitlines()[-1] == "films: nothing changed: the sinks hold what the app makes"
    assert versions(config, films) == before
    films.title = lambda film: film["title"].upper() if film["film_id"] in {29, 30} else film["title"]
    edit(films)
    late = replay(path, "--into", "same", "--json", "--from", str(Lsn(400)))
    assert late.exit_code == 1
    assert {name: sink["examples"] for name, sink in report(late).items()} == {
        "SearchIndex films": {"changed": ["30"]},
        "LakeTable films": {"changed": ["30"]},
    }


def test_what_moves_while_the_service_runs_is_no_difference(config: Config, films: Films) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool, LocalLogWriter.open(config.log_folder("studio")) as writer:
        service = pool.submit(operate.follow_process, config, "films", stop=stop)
        feed = Feed(writer)
        replaying = pool.submit(operate.replay, config, "films", into="beside")
        number = 0
        while not replaying.done() and number < 500:
            number += 1
            feed.commit(update(FILM, film_id=40, title=f"forty, {number}", year=1970))
            wait([replaying], timeout=0.02)
        stop.set()
        service.result()
        replayed = replaying.result()
    assert replayed.differing == 0
    assert operate.replay(config, "films").may_replace


def test_two_replays_do_not_share_a_name(config: Config, films: Films) -> None:
    seen: list[str] = []

    def again(film: Film) -> str:
        if not seen:
            with pytest.raises(operate.ReplayError, match="does so now") as refused:
                operate.replay(config, "films")
            seen.append(str(refused.value))
        return film["title"]

    films.title = again
    edit(films)
    assert operate.replay(config, "films").may_replace
    assert len(seen) == 1


def test_a_start_that_is_none_and_a_name_that_leads_elsewhere_are_refused(config: Config) -> None:
    with pytest.raises(operate.ReplayError, match="expected a position"):
        operate.parse_start("yesterday")
    with pytest.raises(operate.ReplayError, match="letters, digits"):
        operate.replay(config, "films", into="../../elsewhere")


def test_a_place_in_the_log_is_found_by_position_and_by_time(config: Config) -> None:
    log = LocalLogReader(config.log_folder("studio"))
    assert [last_group_at(log, Lsn(position)) for position in (0, 9, 10, 415, 9_999)] == [-1, -1, 0, 40, 43]
    assert position_before(log, EPOCH) == Lsn(9)
    assert position_before(log, EPOCH + timedelta(seconds=20)) == Lsn(19)
    assert position_before(log, EPOCH + timedelta(days=1)) == log.end().position
    until = LogUntil(log, sequence=4)
    assert (until.end().sequence, until.end().position) == (4, Lsn(50))
    assert [group.header.sequence for group in until.read(after_sequence=2)] == [3, 4]
    until.move(5)
    assert until.end().position == Lsn(60)


# Apps that remember, and that choose


class Dated(TypedDict):
    film_id: int
    title: str
    released_on: date


class Decade(TypedDict):
    window_id: str
    films: int


class Shaped(Films):
    """One that sums up windows, holds back what is equal, or chooses sinks."""

    def __init__(self, shape: str) -> None:
        super().__init__(reads_roles=False)
        self.shape = shape

    def app(self) -> App:
        films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

        @films.transform
        def document(film: Entity[Film]) -> Dated:
            released_on = date(film.after["year"], 1, 1)
            return {"film_id": film.after["film_id"], "title": self.title(film.after), "released_on": released_on}

        match self.shape:
            case "window":
                films.window(time="released_on", size=timedelta(days=3653), films=count())
                films.sink(LakeTable("decades", schema=Decade))
            case "dedup":
                films.dedup("title")
                films.sink(LakeTable("films", schema=Dated))
            case "routed":

                @films.route
                def by_age(film: Dated) -> str:
                    return "old" if film["released_on"].year < 1950 else "new"

                films.sink(SearchIndex("old", text={"title": 1.0}))
                films.sink(LakeTable("new", schema=Dated))
        return films


@pytest.mark.parametrize("films", [Shaped(shape) for shape in ("window", "dedup", "routed")], ids=lambda it: it.shape)
def test_an_app_that_remembers_or_chooses_replays_equal_and_shows_what_changed(path: Path, films: Shaped) -> None:
    done = replay(path)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.splitlines()[-1].endswith("it makes the same documents")

    if films.shape == "window":
        refused = replay(path, "--from", str(Lsn(400)))
        assert "its windows sum up what came before" in str(refused.exception)
        return
    films.title = lambda film: film["title"].upper() if film["film_id"] in {3, 34} else film["title"]
    edit(films)
    changed = replay(path, "--json")
    assert changed.exit_code == 1
    keys = [key for sink in report(changed).values() for key in sink["examples"]["changed"]]  # type: ignore[index]
    assert sorted(keys) == ["3", "34"]


def test_a_replay_into_the_same_sinks_is_done_by_the_running_service(config: Config, films: Films) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        service = pool.submit(operate.follow_process, config, "films", stop=stop)
        try:
            replayed = operate.replay(config, "films", into="same")
        finally:
            stop.set()
        service.result(timeout=60)
    assert replayed.differing == 0
    assert replayed.may_replace
    assert operate.replay(config, "films").may_replace
