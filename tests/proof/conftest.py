"""The shop, captured from a real database, for each test."""

import random
import sys
import types
from pathlib import Path

import pytest
import yaml
from proof.shop import an_app
from servers.postgres import Database

from deltaworks.config import Config, load


@pytest.fixture
def config_file(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = types.ModuleType("items_of_the_shop")
    module.items = an_app()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    database.execute(
        "create table item (id int primary key, title text not null, kind int not null)",
        "create table part (part_id int primary key, id int not null)",
    )
    path = tmp_path / "deltaworks.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "home": "home",
                "sources": {"shop": {"kind": "postgres", "dsn": database.dsn, "tables": ["item", "part"]}},
                "apps": {"items": {"module": "items_of_the_shop:items", "source": "shop"}},
            }
        )
    )
    return path


@pytest.fixture
def config(config_file: Path) -> Config:
    return load(config_file, environment={})


@pytest.fixture
def dice() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - a failed run is repeated with it
    return random.Random(seed)
