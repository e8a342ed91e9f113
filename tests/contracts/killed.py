"""An app over the sink under test, in processes that die at named steps; the log outlives them, as in life.

log ──► document, which cannot be made of a poisoned film ──► the sink
"""

import importlib
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import pyarrow as pa
from contracts.sinks import NOTHING, House
from servers import forked

from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.process.runner import Runner
from deltaworks.process.sink import SinkSpec
from deltaworks.testing.changes import Change, Feed, create, delete, table_schema, update
from deltaworks.testing.faults import kill_at

TEXT = (pa.string(), "text", False)
FILM = table_schema("film", "film_id", film_id=TEXT, title=TEXT)
POISON = "poison"
"""Begins the titles that no document can be made of until the app is mended."""

READING = ("process.after_read", "process.before_fold_commit", "process.after_fold")
LEAVING = ("process.before_write", "process.after_write", "process.after_flush")
SETTLING = ("process.before_settle_commit", "process.after_checkpoint")
PATIENCE_S = 60
CLIENTS = (
    "confluent_kafka",
    "opensearchpy",
    "redis",
    "pymysql",
    "httpx",
    "httpcore",
    "h11",
    "psycopg",
    "tantivy",
    "duckdb",
)
"""What sinks import when they open."""


class Row(TypedDict):
    title: str


def films_app(spec: SinkSpec, *, keeps_rows: bool, is_mended: bool) -> App:
    """Of either plan: an app that reads two tables has to keep the rows of both."""
    studio = Source("studio")
    sources = [studio.table("film", schema=Row)]
    if keeps_rows:
        sources.append(studio.table("note", key="film_id", schema=Row))
    films = App("films", key="film_id", sources=sources)

    @films.transform
    def document(film: Entity[Row]) -> dict[str, Any]:
        if film.after["title"].startswith(POISON) and not is_mended:
            raise ValueError(film.after["title"])
        return {**NOTHING, "film_id": film.key, "title": film.after["title"]}

    films.sink(spec)
    return films


class Lives:
    """Changes for a log, and lives of the app that reads it; `expected` is the fold of the changes, by key."""

    def __init__(self, house: House, feed: Feed, tell: Connection, output: Path, *, seed: int) -> None:
        self.house = house
        self.expected: dict[str, str] = {}
        self._feed = feed
        self._tell = tell
        self._output = output
        self._dice = random.Random(seed)
        self._number = 0

    def change(self, keys: Sequence[str], *, poison: bool = False) -> None:
        """Commit some changes of some of these keys, titles numbered in their order; with `poison` one of each."""
        changes: list[Change] = []
        for key in keys if poison else self._dice.choices(keys, k=5):
            self._number += 1
            if not poison and key in self.expected and self._dice.random() < 0.2:
                del self.expected[key]
                changes.append(delete(FILM, film_id=key))
                continue
            title = f"{POISON} {self._number}" if poison else str(self._number)
            changes.append((update if key in self.expected else create)(FILM, film_id=key, title=title))
            self.expected[key] = title
        self._feed.commit(*changes)

    def live(self, die_at: str | None = None, *, is_mended: bool = False) -> str:
        """A life that ends by itself, or at that step where it comes there; what it said last."""
        self._output.write_text("")
        self._tell.send((die_at, is_mended))
        assert self._tell.poll(PATIENCE_S), f"a life that was to end at {die_at} goes on: {self._output.read_text()}"
        ended, said = self._tell.recv(), self._output.read_text()
        expected = (0,) if die_at is None else (0, -signal.SIGKILL)
        assert ended in expected, f"a life that was to end at {die_at} ended {ended}: {said}"
        return said.splitlines()[-1] if ended == 0 else ""

    def titles(self) -> dict[str, str]:
        """What the sink's readers find."""
        return {key: body["title"] for key, body in self.house.state().items()}


@contextmanager
def lives(house: House, folder: Path, *, keeps_rows: bool, seed: int) -> Iterator[Lives]:
    """A log, and a process that forks a life of the app each time it is told to: so a life costs no imports."""
    output = folder / "lives.txt"
    tell, told = multiprocessing.Pipe()
    parent = forked.call(_fork_lives, told, house.spec, house.config, keeps_rows, output=output)
    told.close()
    with LocalLogWriter.open(house.config.log_folder("studio")) as writer, tell:
        yield Lives(house, Feed(writer), tell, output, seed=seed)
    parent.wait(timeout=PATIENCE_S)


def _fork_lives(told: Connection, spec: SinkSpec, config: Config, keeps_rows: bool) -> None:
    known: set[str] = set()
    while True:
        try:
            die_at, is_mended = told.recv()
        except EOFError:
            return
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _live(films_app(spec, keeps_rows=keeps_rows, is_mended=is_mended), config, die_at, is_mended, writing)
        os.close(writing)
        with os.fdopen(reading) as imported:
            # What the sink's client costs to import is paid by the first life alone.
            for name in set(imported.read().split()) - known:
                known.add(name)
                with suppress(ImportError):
                    importlib.import_module(name)
        told.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _live(app: App, config: Config, die_at: str | None, is_mended: bool, writing: int) -> NoReturn:
    """One life: until the end of the log, or until its step. One that ends by itself tells what it imported."""
    try:
        if die_at is not None:
            kill_at(die_at)
        with Runner.open(app, config=config, name="films") as runner:
            if is_mended:
                runner.retry_dead()
            report = runner.drain(patience_s=PATIENCE_S)
            print(sorted(letter.key for letter in runner.dead()), report.held, flush=True)  # noqa: T201 - told to the test
        with os.fdopen(writing, "w") as imported:
            imported.write(" ".join(name for name in list(sys.modules) if name.startswith(CLIENTS)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
