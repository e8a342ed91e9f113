"""A log, a sink, a configuration and a service for each test."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from process.faulty_service import FaultyService
from process.film_app import film_app
from process.material import Feed, TableSink, config_in, wait_until
from process.shared_world import World

from deltaworks import operate
from deltaworks.config import Config, load
from deltaworks.log.memory import MemoryLog
from deltaworks.process.live import read_live


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def feed(log: MemoryLog) -> Feed:
    return Feed(log.writer())


@pytest.fixture
def sink(tmp_path: Path) -> TableSink:
    return TableSink(tmp_path / "sink.sqlite")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    return partial(config_in, tmp_path / "home")


@pytest.fixture
def films_path(tmp_path: Path, service: FaultyService, sink: TableSink, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file of the app `films`, for what takes one: commands, Dagster and services."""
    module = ModuleType("films_under_test")
    module.films = film_app(sink)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "deltaworks.yaml"
    app = {"module": "films_under_test:films", "source": "studio", "settings": {"url": service.url}}
    source = {"kind": "postgres", "dsn": "none", "tables": ["film"]}
    path.write_text(yaml.safe_dump({"sources": {"studio": source}, "apps": {"films": app}}))
    return path


@pytest.fixture
def films_config(films_path: Path) -> Config:
    return load(films_path, environment={})


@pytest.fixture
def running(films_config: Config) -> Iterator[None]:
    """The process service of the app, for the length of the test."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(operate.follow_process, films_config, "films", stop=stop)
        wait_until(lambda: read_live(films_config.app_folder("films")) is not None)
        try:
            yield
        finally:
            stop.set()
        followed.result()


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(tmp_path / f"world{len(made)}", **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def service() -> Iterator[FaultyService]:
    found = FaultyService()
    yield found
    found.stop()
