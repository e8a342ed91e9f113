"""What a person sees: the search page, and Dagster's picture of where the data comes from."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from deltaworks.config import load
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import Lsn, Version
from deltaworks.process.registry import load_app
from deltaworks.process.sink import Document
from deltaworks.store.search import SearchIndex
from deltaworks.testing.changes import Feed, create, table_schema
from deltaworks.testing.postgres import free_port

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ARROW_DOWN, ENTER, ESCAPE = "\ue015", "\ue007", "\ue00c"


@contextmanager
def served(command: list[str], url: str, browser: Any, *, log: Path, **environment: str) -> Iterator[None]:
    """A server in a child process, from when it answers until the end of the block."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    try:

        def answers() -> bool:
            assert child.poll() is None, log.read_text()
            try:
                return httpx.get(url, timeout=2).is_success
            except httpx.TransportError:
                return False

        browser.wait(answers, timeout_s=90)
        yield
    finally:
        child.terminate()
        child.wait(20)


def film(number: int, title: str, director: str) -> dict[str, Any]:
    return {
        "movie_id": number,
        "title": title,
        "year": 1942,
        "genres": ["Drama"],
        "directors": [{"person_id": number, "name": director}],
        "cast": [],
        "writers": [],
        "rating": {"imdb": 8.5, "votes": 600_000},
    }


def test_a_person_finds_films_with_the_keyboard_alone(browser: Any, tmp_path: Path) -> None:
    port = free_port()
    path = tmp_path / "deltaworks.yaml"
    path.write_text((ROOT / "deltaworks.yaml").read_text().replace("port: 8400", f"port: {port}"))
    config = load(path, environment={})
    app = load_app(config, "movie_search")
    index = next(spec for spec in app.sinks if isinstance(spec, SearchIndex))
    sink = index.open(app="movie_search", key="movie_id", config=config)
    films = [
        (1, "Casablanca", "Michael Curtiz"),
        (2, "Mildred Pierce", "Michael Curtiz"),
        (3, "Laura", "Otto Preminger"),
    ]
    sink.write(
        [
            Document(key=n, version=Version(Lsn(n), 0), committed_at=datetime.now(UTC), body=film(n, title, director))
            for n, title, director in films
        ]
    )
    sink.flush(up_to=Lsn(3))
    sink.close()

    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "deltaworks"), "serve", "--config", str(path)]
    with served(command, f"{url}/health", browser, log=tmp_path / "serve.log"):
        browser.open(url)
        browser.press("/", *"michael cur")
        browser.wait(lambda: "2 results" in browser.text())
        assert "Casablanca" in browser.text()
        assert "Laura" not in browser.text()
        assert "3 documents" in browser.text()
        assert "0/3" in browser.text()

        browser.press(ARROW_DOWN, ENTER)
        browser.wait(lambda: browser.run("return document.querySelectorAll('details[open]').length") == 1)
        browser.screenshot(tmp_path / "search.png")

        browser.press(ESCAPE)
        browser.wait(lambda: browser.run("return document.getElementById('q').value") == "")


RELEASES = """
from typing import TypedDict
from deltaworks.process.app import App, Source
from deltaworks.testing.memory_sink import MemorySink

class Film(TypedDict):
    title: str

class Role(TypedDict):
    role_id: int

studio = Source("studio")
films = App("films", key="film_id", sources=[studio.table("film", schema=Film), studio.table("role", schema=Role)])

@films.transform
def document(film):
    if film.key == 13:
        raise ValueError
    return {"title": film.after["title"]}

films.sink(MemorySink("films"))
"""


FILM_TABLE = table_schema("film", "film_id", film_id=(pa.int32(), "integer", False), title=(pa.string(), "text", False))


@contextmanager
def films_served(browser: Any, folder: Path) -> Iterator[tuple[Feed, str]]:
    """The feed of an app whose service runs, over thirty films of which one is a dead letter, and its page."""
    port = free_port()
    (folder / "releases.py").write_text(RELEASES)
    path = folder / "deltaworks.yaml"
    path.write_text(
        "sources: {studio: {kind: postgres, dsn: none, tables: [film]}}\n"
        "apps: {films: {module: 'releases:films', source: studio}}\n"
        f"serve: {{port: {port}}}\n"
    )
    writer = LocalLogWriter.open(load(path, environment={}).log_folder("studio"))
    feed = Feed(writer)
    feed.commit(*(create(FILM_TABLE, film_id=number, title="Laura") for number in range(30)))

    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "deltaworks"), "serve", "--config", str(path)]
    running = [str(BIN / "deltaworks"), "process", "films", "--config", str(path), "--metrics", str(free_port())]
    with (
        closing(writer),
        served(command, f"{url}/health", browser, log=folder / "serve.log", PYTHONPATH=str(folder)),
        served(running, f"http://127.0.0.1:{running[-1]}/metrics", browser, log=folder / "process.log",
               PYTHONPATH=str(folder)),
    ):  # fmt: skip
        yield feed, url


def test_an_operator_sees_an_app_live_and_pauses_it_with_the_keyboard_alone(browser: Any, tmp_path: Path) -> None:
    with films_served(browser, tmp_path) as (feed, url):
        browser.open(url)
        browser.wait(lambda: "running for" in browser.text() and "1 dead letter" in browser.text())
        assert "ValueError at" in browser.text()

        browser.press("j", "p")
        browser.wait(lambda: "paused for" in browser.text())
        assert browser.run("return document.activeElement.id") == "app-films"
        feed.commit(create(FILM_TABLE, film_id=100, title="Gilda"))
        browser.wait(lambda: re.search(r"changes to read\s+1\b", browser.text()) is not None)
        browser.screenshot(tmp_path / "paused.png")

        browser.press("p")
        browser.wait(lambda: "running for" in browser.text())
        browser.wait(lambda: re.search(r"changes to read\s+0\b", browser.text()) is not None)
        browser.press("r")
        browser.wait(lambda: "1 dead letter" in browser.text())
        browser.screenshot(tmp_path / "running.png")


def test_an_operator_is_asked_before_anything_is_lost_and_answers_with_the_keyboard(
    browser: Any, tmp_path: Path
) -> None:
    with films_served(browser, tmp_path) as (feed, url):
        is_asked = "return document.querySelector(':popover-open')?.innerText ?? ''"
        browser.open(url)
        browser.wait(lambda: "running for" in browser.text() and "1 dead letter" in browser.text())

        browser.press("d")
        assert "Drop what failed for 13?" in browser.run(is_asked)
        browser.screenshot(tmp_path / "drop.png")
        # Changes come and go; what is asked stays, and Escape or the button that has the focus keeps it.
        feed.commit(create(FILM_TABLE, film_id=101, title="Gilda"))
        for key in (ESCAPE, ENTER):
            browser.wait(lambda: browser.run("return document.activeElement.innerText") == "Keep it")
            browser.press(key)
            browser.wait(lambda: browser.run(is_asked) == "")
            browser.press("d")
        browser.wait(lambda: browser.run("return document.activeElement.innerText") == "Keep it")
        browser.run("document.querySelector(':popover-open .danger').focus()")
        browser.press(ENTER)
        browser.wait(lambda: "dead letter" not in browser.text())
        browser.wait(lambda: "running for" in browser.text())

        # A question that came with the page, from before there was JavaScript, is one like any other.
        browser.open(f"{url}/apps?ask=sure-anew-films")
        browser.wait(lambda: "Make every document of films anew?" in browser.run(is_asked))
        browser.wait(lambda: browser.run("return location.search") == "")
        browser.press(ESCAPE)
        browser.wait(lambda: browser.run(is_asked) == "")

        browser.press("a")
        browser.wait(lambda: "Make every document of films anew?" in browser.run(is_asked))
        browser.screenshot(tmp_path / "reprocess.png")
        browser.press(ENTER)
        # What was dropped is made anew as well, and fails again.
        browser.wait(lambda: "1 dead letter" in browser.text())


def test_dagster_draws_the_graph_from_source_to_release(browser: Any, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "dagster-webserver"), "--host", "127.0.0.1", "--port", str(port), "-w", "workspace.yaml"]
    home = tmp_path / "dagster"
    home.mkdir()
    # No survey and no dialog over the page; storage of this test alone.
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    with served(command, f"{url}/server_info", browser, log=tmp_path / "webserver.log", DAGSTER_HOME=str(home)):
        browser.open(f"{url}/asset-groups")
        groups = {"source", "capture", "process", "store", "gate"}
        browser.wait(lambda: groups <= set(browser.text().split("\n")), timeout_s=60)
        browser.screenshot(tmp_path / "groups.png")

        browser.open(f"{url}/assets/released?view=lineage&lineageScope=upstream&lineageDepth=5")
        states = ["released", "director_career", "int_film", "stg_movie", "credit"]
        browser.wait(lambda: all(name in browser.text() for name in states), timeout_s=60)
        browser.screenshot(tmp_path / "lineage.png")
