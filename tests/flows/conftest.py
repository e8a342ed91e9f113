"""The whole chain on a small studio: database, Talent Service, configuration."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from flows.chain import ROOT, Studio
from flows.shared_orders import ORDER
from flows.shared_shop import ORDERS, Shop
from process.material import Feed, create
from servers.kafka import KafkaCluster
from servers.postgres import Database

from deltaworks import config as configuration
from deltaworks.log.registry import log_of
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


@pytest.fixture
def shop(small_kafka: KafkaCluster, tmp_path: Path) -> Iterator[Shop]:
    """Orders in the log, each of which is refused; no member runs yet."""
    made = Shop(tmp_path, small_kafka.brokers)
    made.refuse(*range(ORDERS))
    with closing(log_of(made.config(), "shop").writer()) as writer:
        made.feed = Feed(writer)
        made.feed.commit(*(create(ORDER, order_id=order, status="open") for order in range(ORDERS)))
        try:
            yield made
        except BaseException:
            for output in tmp_path.glob("*.log"):
                print(f"== {output.name}\n{output.read_text()[-3_000:]}")  # noqa: T201  # pytest shows it where it fails
            raise
        finally:
            for member in made.members.values():
                member.kill()
                member.wait()
