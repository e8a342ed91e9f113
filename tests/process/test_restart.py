"""A service that ended because of a step which never returned is started again, and goes on without that change."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process.material import INT, TEXT, Feed, create, table_schema, wait_until
from servers import forked

from deltaworks import operate
from deltaworks.config import Config, load
from deltaworks.log.local import LocalLogWriter
from deltaworks.process import watchdog
from deltaworks.process.standing import read_standings
from deltaworks.process.stuck import EXIT_STUCK

ROOT = Path(__file__).resolve().parents[2]
FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
PATIENCE_S = 60
APP = """
import time
from typing import TypedDict
from deltaworks.process.app import App, Source
from deltaworks.store.search import SearchIndex

class Film(TypedDict):
    title: str

films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

@films.filter
def hangs(film):
    while film.key == 2:
        try:
            time.sleep(0.01)
        except BaseException:
            continue
    return True

films.sink(SearchIndex("films", text={"title": 1.0}))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An app that nothing but the end of its process ends on film 2, over films 1 to 3."""
    (tmp_path / "hanging_films.py").write_text(APP)
    path = tmp_path / "deltaworks.yaml"
    path.write_text(
        "sources: {studio: {kind: postgres, dsn: none, tables: [film]}}\n"
        "apps: {films: {module: 'hanging_films:films', source: studio, step_limit_s: 0.3}}\n"
    )
    with LocalLogWriter.open(config_of(path).log_folder("studio")) as writer:
        Feed(writer).commit(*(create(FILM, film_id=number, title="Laura") for number in (1, 2, 3)))
    return path


def config_of(path: Path) -> Config:
    return load(path, environment={})


def be_impatient(folder: str) -> None:
    """In the service's process: let it find the app, and look at its steps often."""
    sys.path.append(folder)
    watchdog._LOOK_EVERY_S = 0.02


def has_gone_on(path: Path) -> bool:
    """Whether everything is settled but the change that hung."""
    standings = read_standings(config_of(path).app_folder("films"))
    return (standings.to_do, standings.dead, standings.reached.value > 0) == (0, 1, True)


def test_the_command_ends_with_its_code_and_the_next_one_goes_on(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"

    @contextmanager
    def service() -> Iterator[forked.Child]:
        environment = {"DELTAWORKS_CONFIG": str(path)}
        child = forked.start(
            "process",
            "films",
            output=output,
            folder=tmp_path,
            environment=environment,
            before=be_impatient,
            arguments=[str(tmp_path)],
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait(PATIENCE_S)

    with service() as first:
        assert first.wait(PATIENCE_S) == EXIT_STUCK, output.read_text()
    with service() as second:
        wait_until(lambda: has_gone_on(path), what=output.read_text)
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == 0, output.read_text()
    [letter] = operate.dead_letters(config_of(path), "films")
    assert (letter.key, letter.step, "did not return" in letter.error) == (2, "hangs", True)


SERVICE = """#!/bin/sh
trap 'touch drained; exit 0' TERM
while [ ! -e began ]; do sleep 0.05; done
echo life >> lives
[ "$(wc -l < lives)" -gt 1 ] || exit 75
[ ! -e broken ] || exit 3
while :; do sleep 0.05; done
"""
"""Ends with 75 in its first life; in its second it runs until it is asked to end, or is broken for good."""
OTHER = "other: trap 'touch ended; exit 0' TERM; touch began; while :; do sleep 0.05; done"


@contextmanager
def managed(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The Procfile's line for this service, beside another one, as `make up` runs them."""
    [line] = [line for line in (ROOT / "Procfile").read_text().splitlines() if line.startswith("process: ")]
    ours = line.replace(".venv/bin/deltaworks process movie_search", "./service")
    assert ours != line
    (folder / "service").write_text(SERVICE)
    (folder / "service").chmod(0o755)
    (folder / "Procfile").write_text(f"{ours}\n{OTHER}\n")
    with (folder / "output.txt").open("wb") as stream:
        command = [str(Path(sys.executable).with_name("honcho")), "start"]
        manager = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield manager
    finally:
        manager.terminate()
        try:
            manager.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            manager.kill()
            manager.wait()
            raise


def test_the_line_of_the_procfile_begins_again_and_nothing_else_ends(tmp_path: Path) -> None:
    lives, output = tmp_path / "lives", tmp_path / "output.txt"
    with managed(tmp_path):
        # The manager cannot be asked to end before it knows of both.
        wait_until(lambda: output.read_text().count(" started (") == 2, what=output.read_text)
        wait_until(lambda: lives.exists() and lives.read_text() == "life\n" * 2, what=output.read_text)
        assert not (tmp_path / "ended").exists(), output.read_text()
    # Asked to end, it is waited for, and not begun once more.
    assert (tmp_path / "drained").exists(), output.read_text()
    assert lives.read_text() == "life\n" * 2


def test_any_other_end_stops_everything_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with managed(tmp_path) as manager:
        assert manager.wait(PATIENCE_S) == 3, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "ended").exists()
