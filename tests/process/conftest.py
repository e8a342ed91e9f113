"""A log, a sink, a configuration and a service for each test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from process.faulty_service import FaultyService
from process.material import Feed, TableSink

from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog


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
    def make(name: str = "films", **settings: Any) -> Config:
        return Config.model_validate(
            {
                "home": tmp_path / "home",
                "sources": {"studio": {"kind": "postgres", "dsn": "postgresql://nowhere", "tables": ["film"]}},
                "apps": {name: {"module": "none:none", "source": "studio", "settings": settings}},
            }
        )

    return make


@pytest.fixture
def service() -> Iterator[FaultyService]:
    found = FaultyService()
    yield found
    found.stop()
