"""A service that ended because of a step which never returned is started again, and goes on without that change."""

import os
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


def let_import_from(folder: str) -> None:
    sys.path.append(folder)


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
            before=let_import_from,
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


def test_the_line_of_the_procfile_starts_it_again_and_nothing_else_ends(path: Path, tmp_path: Path) -> None:
    [line] = [line for line in (ROOT / "Procfile").read_text().splitlines() if line.startswith("process: ")]
    ours = line.replace(
        ".venv/bin/deltaworks process movie_search", f"{sys.executable} -m deltaworks.cli process films"
    )
    assert ours != line
    # It tells of its end, which must not come before the one that was asked for.
    other = "other: trap 'touch ended; exit 0' TERM; touch began; while :; do sleep 0.1; done"
    (tmp_path / "Procfile").write_text(f"{ours}\n{other}\n")
    output = tmp_path / "output.txt"
    with output.open("wb") as stream:
        manager = subprocess.Popen(
            [str(Path(sys.executable).with_name("honcho")), "start"],
            cwd=tmp_path,
            env={**os.environ, "DELTAWORKS_CONFIG": str(path), "PYTHONPATH": str(tmp_path)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: has_gone_on(path), what=output.read_text)
        assert (tmp_path / "began").exists()
        assert not (tmp_path / "ended").exists(), output.read_text()
    finally:
        manager.terminate()
        manager.wait(PATIENCE_S)
    assert (tmp_path / "ended").exists()
    # Asked to end, the service ends in peace and is not begun a third time.
    said = output.read_text()
    assert said.count("process ends, a step cannot be ended") == 1, said
