"""A lake for each test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaworks.store.lake import Lake


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture
def lake_settings(tmp_path: Path, extensions: Path) -> dict[str, Any]:
    return {
        "catalog": f"sqlite:{tmp_path}/lake/catalog.sqlite",
        "data": str(tmp_path / "lake" / "data"),
        "extensions": extensions,
    }


@pytest.fixture
def lake(lake_settings: dict[str, Any]) -> Iterator[Lake]:
    with Lake.open(**lake_settings) as lake:
        yield lake
