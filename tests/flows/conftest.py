"""The whole chain on a small studio: database, Talent Service, configuration."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from flows.chain import ROOT, Studio
from servers.postgres import Database

from deltaworks import config as configuration
from deltaworks.testing.postgres import free_port
from studio import catalogue
from studio.database import load

FILMS = 200


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first films of the catalogue, in a file of their own."""
    path = tmp_path_factory.mktemp("films") / "films.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("attach ? as whole", [str(catalogue.default_path())])
        for table in ("omdb", "tomatoes"):
            connection.execute(f"create table {table} as select * from whole.{table} order by ID limit {FILMS}")
        connection.commit()
    return path


@pytest.fixture
def studio(database: Database, films: Path, tmp_path: Path) -> Iterator[Studio]:
    """A loaded studio database and a configuration for it; nothing runs yet."""
    load(database.dsn, path=films)
    talent_port = free_port()
    settings = yaml.safe_load((ROOT / "deltaworks.yaml").read_text())
    settings["home"] = str(tmp_path / "home")
    # Slots belong to the server, not to the database, so each test has a name of its own.
    settings["sources"]["studio"] |= {"dsn": database.dsn, "slot": database.name, "chunk_rows": 500}
    settings["apps"]["movie_search"]["settings"]["talent_url"] = f"http://127.0.0.1:{talent_port}"
    settings["serve"]["port"] = free_port()
    path = tmp_path / "deltaworks.yaml"
    path.write_text(yaml.safe_dump(settings))
    made = Studio(database, path, configuration.load(path, environment={}), talent_port)
    yield made
    made.stop()
