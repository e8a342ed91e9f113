"""The examples do what their first lines say: with the kit, and with the real store behind each."""

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest
from servers.postgres import Database
from servers.redis import RedisServer

from deltaworks.config import Config
from deltaworks.process.app import App
from deltaworks.process.runner import Runner
from deltaworks.store.sinks.webhook import is_authentic
from deltaworks.testing.app import assert_app, run_app
from deltaworks.testing.service import Call, FakeService, Status
from deltaworks.testing.source import ListSource, RowChange, delete, insert, update
from examples import release_notice, warehouse_sync, warm_cache

SECRET = "the-secret-of-this-partner"


def run_for_real(app: App, source: ListSource, home: Path, **connections: Any) -> None:
    """The app with its own sinks."""
    config = Config.model_validate(
        {
            "home": home,
            "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["movie"]}},
            "apps": {app.name: {"module": "none:none", "source": "studio"}},
            "connections": connections,
        }
    )
    with Runner.open(app, config=config, name=app.name, log=source.reader()) as runner:
        assert runner.drain().dead == 0


MOVIE = insert("movie", movie_id=1, title="Alien", released_on=date(1979, 5, 25), status="released")


def test_the_warehouse_row_follows_the_film_and_its_rating() -> None:
    assert_app(
        warehouse_sync.films,
        changes=[
            MOVIE,
            insert("rating", rating_id=1, movie_id=1, imdb_rating=8.4),
            update("rating", rating_id=1, imdb_rating=8.5),
            insert("movie", movie_id=2, title="Untitled", status="draft"),
        ],
        then={
            1: {"movie_id": 1, "title": "Alien", "year": 1979, "rating": 8.5, "is_public": True},
            2: {"movie_id": 2, "title": "Untitled", "year": None, "rating": None, "is_public": False},
        },
        keys={"rating": "rating_id"},
    )


def test_the_warehouse_table_is_in_step(database: Database, tmp_path: Path) -> None:
    database.execute("create schema mart")
    source = ListSource(warehouse_sync.films)
    for change in (MOVIE, insert("movie", movie_id=2, title="Untitled", status="draft")):
        source.commit(change)
    run_for_real(warehouse_sync.films, source, tmp_path, warehouse={"kind": "postgres", "dsn": database.dsn})
    source.commit(delete("movie", movie_id=2), update("movie", movie_id=1, title="Alien 1979"))
    run_for_real(warehouse_sync.films, source, tmp_path, warehouse={"kind": "postgres", "dsn": database.dsn})

    with psycopg.connect(database.dsn) as connection:
        rows = connection.execute("select movie_id, title, year from mart.film where title is not null").fetchall()
    assert rows == [(1, "Alien 1979", 1979)]


def test_a_partner_is_told_of_each_release_once_it_answers() -> None:
    draft = {"movie": [{"movie_id": 1, "title": "Alien", "status": "draft"}]}
    released: list[RowChange] = [update("movie", movie_id=1, status="released")]
    with FakeService(lambda call: {}) as partner:
        partner.script(Status(503))
        run_app(
            release_notice.films,
            given=draft,
            changes=released,
            settings={"partner_url": partner.url, "partner_secret": SECRET},
            patience_s=5,
        )

    notices = [json.loads(call.body) for call in partner.calls]
    assert notices == [{"film": 1, "title": "Alien", "was": "draft"}] * 2
    assert len({call.headers["idempotency-key"] for call in partner.calls}) == 1
    assert all(_is_signed(call) for call in partner.calls)


def _is_signed(call: Call) -> bool:
    named = {"-".join(part.capitalize() for part in name.split("-")): value for name, value in call.headers.items()}
    return is_authentic(call.body, named, secret=SECRET, now=time.time())


CREDITS = [
    insert("credit", movie_id=1, person_id=7, role="cast"),
    insert("credit", movie_id=1, person_id=9, role="director"),
]


def test_the_cache_has_what_visitors_may_see() -> None:
    assert_app(
        warm_cache.films,
        changes=[
            [insert("movie", movie_id=1, title="Alien", status="released"), *CREDITS],
            insert("movie", movie_id=2, title="Untitled", status="draft"),
            insert("movie", movie_id=3, title="Gilda", status="released"),
            update("movie", movie_id=3, status="withdrawn"),
        ],
        then={1: {"title": "Alien", "cast": [7]}},
    )


@pytest.mark.server
def test_the_cache_is_warm_in_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    import redis  # noqa: PLC0415 - only where a server is

    source = ListSource(warm_cache.films)
    source.commit(insert("movie", movie_id=1, title="Alien", status="released"), *CREDITS)
    run_for_real(warm_cache.films, source, tmp_path, cache={"kind": "redis", "url": redis_server.url()})

    with redis.Redis.from_url(redis_server.url()) as client:
        assert json.loads(client.hget("film:1", "body")) == {"title": "Alien", "cast": [7]}
        assert 0 < client.ttl("film:1") <= 3600


@pytest.mark.parametrize("module", [warehouse_sync, release_notice, warm_cache])
def test_an_example_is_short(module: Any) -> None:
    text = Path(sys.modules[module.__name__].__file__ or "").read_text()
    code = text.split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in code) <= 40
