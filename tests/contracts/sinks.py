"""Every sink as the contract suite sees it: how it is declared, and what its readers would find.

A new sink is one function here and its name in `HERE` or `SERVERS`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import pytest
from servers.webhook import SECRET

from deltaworks.config import Config
from deltaworks.log.local import LocalLogReader
from deltaworks.process.document_json import document_json
from deltaworks.process.sink import Capabilities, Sink, SinkSpec, key_text, open_reader
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search import SearchIndex
from deltaworks.store.sinks.kafka_topic import KafkaTopic
from deltaworks.store.sinks.mysql_table import MySqlTable
from deltaworks.store.sinks.opensearch_index import OpenSearchIndex
from deltaworks.store.sinks.postgres_table import PostgresTable
from deltaworks.store.sinks.redis_cache import RedisCache
from deltaworks.store.sinks.webhook import Webhook
from deltaworks.testing.memory_sink import UNFIT, MemorySink


class Person(TypedDict):
    name: str
    born: int | None


class Film(TypedDict):
    """A value of each type that an app may declare, inside others too."""

    film_id: str
    title: str | None
    votes: int | None
    score: float | None
    rating: Decimal | None
    is_seen: bool | None
    released_on: date | None
    updated_at: datetime | None
    poster: bytes | None
    tags: list[str] | None
    lead: Person | None
    cast: list[Person] | None


NOTHING = dict.fromkeys(Film.__annotations__)
"""A film of which only the key is known."""


@dataclass(frozen=True, kw_only=True)
class House:
    """One sink with a place of its own."""

    spec: SinkSpec
    config: Config
    state: Callable[[], dict[str, Mapping[str, Any]]]
    """What its readers find, by key text."""
    form: Callable[[Mapping[str, Any]], Any] = lambda body: body
    """What a body that was written looks like when it is read."""
    unfit: Mapping[str, Any]
    """Values that make a film one that the sink can never take."""
    away: Callable[[], AbstractContextManager[None]] | None = None
    """Makes its server absent; not where there is none."""
    steps: Sequence[str] = ()
    """Places in the sink itself where dying would be interesting, as `faults.reach` names them."""
    many: int = 10_000
    """Documents of a large batch: as many as take it a second or two."""
    outlives: bool = True
    """What was flushed is there when the process that flushed it is gone."""

    @property
    def can(self) -> Capabilities:
        return self.spec.capabilities

    def open(self) -> Sink:
        return self.spec.open(app="films", key="film_id", config=self.config)

    @contextmanager
    def opened(self) -> Iterator[Sink]:
        sink = self.open()
        try:
            yield sink
        finally:
            sink.close()


def config_with(home: Path, **connections: Any) -> Config:
    return Config.model_validate(
        {
            "home": home,
            "sources": {"studio": {"kind": "postgres", "dsn": "host=nowhere", "tables": ["film"]}},
            "apps": {"films": {"module": "none:none", "source": "studio"}},
            "connections": connections,
        }
    )


def as_json(body: Mapping[str, Any]) -> Any:
    return json.loads(document_json(body))


def read_back(spec: SinkSpec, config: Config) -> dict[str, Mapping[str, Any]]:
    """The live documents, by way of the sink's own reader."""
    reader = open_reader(spec, app="films", key="film_id", config=config)
    try:
        keys = [stored.key for stored in reader.versions() if not stored.is_deleted]
        found = dict(reader.documents(keys))
        assert found.keys() == set(keys), "a key that is listed has a document"
        return found
    finally:
        reader.close()


def memory(request: pytest.FixtureRequest, home: Path) -> House:
    spec, config = MemorySink("films"), config_with(home)
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        unfit={"tags": UNFIT},
        away=spec.away,
        outlives=False,
    )


def search_index(request: pytest.FixtureRequest, home: Path) -> House:
    spec, config = SearchIndex("films", text={"title": 1.0}), config_with(home)
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        form=as_json,
        unfit={"lead": object()},
        steps=("search.before_append", "search.after_append", "search.before_commit", "search.after_commit"),
    )


def lake_table(request: pytest.FixtureRequest, home: Path) -> House:
    """What the loader will make of the app's log: per key the largest identity."""
    config = config_with(home)

    def state() -> dict[str, Mapping[str, Any]]:
        newest: dict[str, tuple[tuple[int, int], Any]] = {}
        for group in LocalLogReader(config.log_folder("films")).read(after_sequence=-1):
            for batch in group.batches:
                for row in batch.rows.to_pylist():
                    version = (row["_commit"], row["_ordinal"])
                    body = None if row["_op"] == "d" else {name: row[name] for name in Film.__annotations__}
                    if newest.get(row["film_id"], (version,))[0] <= version:
                        newest[row["film_id"]] = (version, body)
        return {key_text(key): body for key, (_, body) in newest.items() if body is not None}

    return House(
        spec=LakeTable("films", schema=Film),
        config=config,
        state=state,
        unfit={"votes": "many"},
        steps=("log.after_write", "log.after_fsync", "log.after_publish"),
    )


def postgres_table(request: pytest.FixtureRequest, home: Path) -> House:
    database = request.getfixturevalue("database")
    gate = request.getfixturevalue("gate")(database.server.port)
    dsn = f"host=127.0.0.1 port={gate.port} user={database.server.superuser} password=the-secret dbname={database.name}"
    config = config_with(home, warehouse={"kind": "postgres", "dsn": dsn})
    spec = PostgresTable("films", connection="warehouse", schema=Film)
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        unfit={"votes": "secret many"},
        away=gate.closed,
        steps=("sql_table.before_commit",),
    )


def webhook(request: pytest.FixtureRequest, home: Path) -> House:
    receiver = request.getfixturevalue("receiver")
    gate = request.getfixturevalue("gate")(receiver.port)
    url = f"http://127.0.0.1:{gate.port}/the-secret-token"
    config = config_with(home, partner={"kind": "webhook", "url": url, "secret": SECRET})
    return House(
        spec=Webhook("films", connection="partner"),
        config=config,
        state=receiver.documents,
        form=as_json,
        unfit={"votes": "secret many"},
        away=gate.closed,
        many=500,
    )


def opensearch_index(request: pytest.FixtureRequest, home: Path) -> House:
    server = request.getfixturevalue("opensearch_server")
    gate = request.getfixturevalue("gate")(server.port)
    config = config_with(
        home,
        search={
            "kind": "opensearch",
            "hosts": [f"http://127.0.0.1:{gate.port}"],
            "user": "any",
            "password": "the-secret",
        },
    )
    spec = OpenSearchIndex(server.new_name(), connection="search", schema=Film)
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        form=as_json,
        unfit={"votes": "secret many"},
        away=gate.closed,
    )


def redis_cache(request: pytest.FixtureRequest, home: Path) -> House:
    server = request.getfixturevalue("redis_server")
    gate = request.getfixturevalue("gate")(server.port)
    config = config_with(home, cache={"kind": "redis", "url": server.url(gate.port)})
    spec = RedisCache(f"films {home}", connection="cache")
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        form=as_json,
        unfit={"lead": object()},
        away=gate.closed,
    )


def mysql_table(request: pytest.FixtureRequest, home: Path) -> House:
    database = request.getfixturevalue("mariadb_database")
    gate = request.getfixturevalue("gate")(database.server.port)
    config = config_with(home, legacy=database.connection(gate.port))
    spec = MySqlTable("films", connection="legacy", schema=Film)
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        form=lambda body: body | {name: as_json(body)[name] for name in ("tags", "lead", "cast")},
        unfit={"votes": "secret many"},
        away=gate.closed,
        steps=("sql_table.before_commit",),
    )


def kafka_topic(request: pytest.FixtureRequest, home: Path) -> House:
    broker = request.getfixturevalue("kafka_broker")
    config = config_with(home, bus=broker.connection())
    spec = KafkaTopic(broker.new_topic(), connection="bus")
    return House(
        spec=spec,
        config=config,
        state=lambda: read_back(spec, config),
        form=as_json,
        unfit={"lead": object()},
        away=broker.gate.closed,
    )


Build = Callable[[pytest.FixtureRequest, Path], House]

HERE: Mapping[str, Build] = {
    "memory": memory,
    "search index": search_index,
    "lake table": lake_table,
    "postgres table": postgres_table,
    "webhook": webhook,
}
"""Those that need Python packages only."""
SERVERS: Mapping[str, Build] = {
    "kafka topic": kafka_topic,
    "opensearch index": opensearch_index,
    "redis cache": redis_cache,
    "mysql table": mysql_table,
}
"""Those that need a server from Debian or Maven."""
PARAMETERS = [*HERE, *(pytest.param(name, marks=pytest.mark.server) for name in SERVERS)]


def build(name: str, request: pytest.FixtureRequest, home: Path) -> House:
    return ({**HERE, **SERVERS}[name])(request, home)
