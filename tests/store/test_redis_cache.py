"""What only a cache does: entries that end, tombstones that end later, a server that is full or forgets its scripts."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from contracts.sinks import config_with, read_back
from servers.redis import RedisServer

from deltaworks.config import Config
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document, SinkAwayError
from deltaworks.store.sinks.redis_cache import RedisCache, RedisError

pytestmark = pytest.mark.server
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def config(redis_server: RedisServer, tmp_path: Path) -> Config:
    return config_with(tmp_path, cache={"kind": "redis", "url": redis_server.url()})


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_server.url()) as client:
        client.flushall()
        yield client
        client.config_set("maxmemory", 0)


def put(spec: RedisCache, config: Config, key: Any, position: int, title: str | None) -> None:
    sink = spec.open(app="films", key="film_id", config=config)
    body = None if title is None else {"title": title}
    sink.write([Document(key=key, version=Version(Lsn(position), 0), committed_at=MOMENT, body=body)])
    try:
        assert sink.flush(up_to=Lsn(0)) == []
    finally:
        sink.close()


def test_an_entry_is_a_hash_that_any_client_reads(config: Config, client: "redis.Redis") -> None:
    put(RedisCache("film", connection="cache"), config, 7, 5, "Alien")
    assert client.hget("film:7", "body") == b'{"title":"Alien"}'
    assert client.ttl("film:7") == -1


def test_an_entry_lives_for_its_ttl_and_a_tombstone_for_its_own(config: Config, client: "redis.Redis") -> None:
    spec = RedisCache("film", connection="cache", ttl_s=100, tombstone_s=1000)
    put(spec, config, 7, 5, "Alien")
    assert 90 < client.ttl("film:7") <= 100
    put(spec, config, 7, 6, None)
    assert 990 < client.ttl("film:7") <= 1000
    assert client.hexists("film:7", "body") is False
    put(spec, config, 7, 7, "Alien again")
    assert 90 < client.ttl("film:7") <= 100


def test_a_late_write_is_refused_while_the_tombstone_lives_and_ends_by_itself_after(
    config: Config, client: "redis.Redis"
) -> None:
    spec = RedisCache("film", connection="cache", ttl_s=100, tombstone_s=1000)
    put(spec, config, 7, 6, None)
    put(spec, config, 7, 5, "late")
    assert read_back(spec, config) == {}
    client.pexpire("film:7", 1)
    while client.exists("film:7"):
        pass
    put(spec, config, 7, 5, "late")
    assert 0 < client.ttl("film:7") <= 100


def test_a_server_that_forgot_its_scripts_is_told_again(config: Config, client: "redis.Redis") -> None:
    spec = RedisCache("film", connection="cache")
    put(spec, config, 7, 5, "Alien")
    client.script_flush()
    put(spec, config, 8, 6, "Brazil")
    assert read_back(spec, config).keys() == {"7", "8"}


def test_a_full_server_is_waited_for(config: Config, client: "redis.Redis") -> None:
    client.config_set("maxmemory", 1)
    with pytest.raises(SinkAwayError, match="cannot take writes now"):
        put(RedisCache("film", connection="cache"), config, 7, 5, "Alien")


def test_a_key_of_another_type_stops_the_app(config: Config, client: "redis.Redis") -> None:
    client.set("film:7", "by another program")
    with pytest.raises(RedisError, match="another type"):
        put(RedisCache("film", connection="cache"), config, 7, 5, "Alien")
    assert client.get("film:7") == b"by another program"


def test_a_wrong_password_stops_the_app_and_is_not_told(redis_server: RedisServer, tmp_path: Path) -> None:
    url = f"redis://:a-wrong-one@127.0.0.1:{redis_server.port}"
    config = config_with(tmp_path, cache={"kind": "redis", "url": url})
    with pytest.raises(RedisError) as raised:
        RedisCache("film", connection="cache").open(app="films", key="film_id", config=config)
    assert "wrong-one" not in str(raised.value)


def test_names_with_signs_of_patterns_list_their_own_keys_only(config: Config, client: "redis.Redis") -> None:
    put(RedisCache("fi*m", connection="cache"), config, 7, 5, "Alien")
    put(RedisCache("film", connection="cache"), config, 8, 5, "Brazil")
    assert read_back(RedisCache("fi*m", connection="cache"), config).keys() == {"7"}
