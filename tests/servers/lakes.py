"""Fixtures: a lake of its own for each test, embedded and, where a test asks for it, as a team has it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deltaworks.store.lake import Lake

OpenLake = Callable[..., Lake]


@pytest.fixture(scope="session")
def extension_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DuckDB's extensions, unpacked once for all tests."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture
def lake_settings(tmp_path: Path, extension_folder: Path) -> dict[str, Any]:
    """Where the test's own lake is."""
    return {
        "catalog": f"sqlite:{tmp_path}/lake/catalog.sqlite",
        "data": str(tmp_path / "lake" / "data"),
        "extensions": extension_folder,
    }


@pytest.fixture
def open_lake(lake_settings: dict[str, Any]) -> OpenLake:
    """Opens the test's own lake; call it again for a second client."""
    return lambda **options: Lake.open(**(lake_settings | options))


@pytest.fixture
def lake(open_lake: OpenLake) -> Iterator[Lake]:
    with closing(open_lake()) as lake:
        yield lake
