"""What only OpenSearch does: versions in the server, tombstones that outlive its own, rebuilds while read."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import pytest
from contracts.sinks import config_with, read_back
from opensearchpy import OpenSearch
from opensearchpy.exceptions import ConflictError
from servers.opensearch import OpenSearchServer

from deltaworks.config import Config
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document, Refusal
from deltaworks.store.sinks.opensearch_index import OpenSearchIndex
from deltaworks.store.sinks.opensearch_layout import OpenSearchLayoutError
from deltaworks.testing.faults import fail_at

pytestmark = pytest.mark.server
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


class Film(TypedDict):
    title: str


class FilmWithYear(TypedDict):
    title: str
    year: int | None


class FilmWithNumber(TypedDict):
    title: int


@pytest.fixture
def client(opensearch_server: OpenSearchServer) -> Iterator[OpenSearch]:
    client = OpenSearch(hosts=[f"http://127.0.0.1:{opensearch_server.port}"])
    yield client
    client.close()


@pytest.fixture
def config(opensearch_server: OpenSearchServer, tmp_path: Path) -> Config:
    return config_with(tmp_path, search={"kind": "opensearch", "hosts": [f"http://127.0.0.1:{opensearch_server.port}"]})


def index(name: str, schema: type = Film, **options: Any) -> OpenSearchIndex:
    return OpenSearchIndex(name, connection="search", schema=schema, **options)


def film(key: str, position: int, title: Any, **more: Any) -> Document:
    body = None if title is None else {"title": title, **more}
    return Document(key=key, version=Version(Lsn(position), 0), committed_at=MOMENT, body=body)


def put(spec: OpenSearchIndex, config: Config, *documents: Document) -> list[Refusal]:
    sink = spec.open(app="films", key="film_id", config=config)
    try:
        sink.write(documents)
        return list(sink.flush(up_to=Lsn(0)))
    finally:
        sink.close()


def found(client: OpenSearch, name: str, query: dict[str, Any] | None = None) -> set[str]:
    answer = client.search(index=name, body={"query": query or {"match_all": {}}, "size": 100})
    return {hit["_id"] for hit in answer["hits"]["hits"]}


def test_a_request_that_arrives_late_is_refused_by_the_server(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    spec = index(opensearch_server.new_name())
    put(spec, config, film("a", 7, "newer"))
    put(spec, config, film("a", 9, None))
    with pytest.raises(ConflictError):
        client.index(index=spec.name, id="a", body={"title": "late"}, version=8, version_type="external")


def test_a_tombstone_outlives_the_servers_memory_of_deletions(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    spec = index(opensearch_server.new_name(), settings={"gc_deletes": "0s"})
    put(spec, config, film("a", 5, "there"), film("b", 5, "there"))
    put(spec, config, film("a", 7, None))
    client.indices.forcemerge(index=spec.name, max_num_segments=1)
    put(spec, config, film("a", 6, "late"))
    assert read_back(spec, config).keys() == {"b"}
    assert found(client, spec.name) == {"b"}


def test_searches_see_documents_and_no_tombstones_by_the_declared_types(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    spec = index(opensearch_server.new_name(), FilmWithYear, mappings={"title": {"type": "keyword"}})
    put(spec, config, film("a", 1, "Alien", year=1979), film("b", 1, "Aliens", year=1986), film("c", 1, None))
    assert found(client, spec.name, {"range": {"year": {"gt": 1980}}}) == {"b"}
    assert found(client, spec.name, {"term": {"title": "Alien"}}) == {"a"}
    assert found(client, spec.name) == {"a", "b"}


def test_an_undeclared_field_is_refused_by_its_name(opensearch_server: OpenSearchServer, config: Config) -> None:
    [refusal] = put(index(opensearch_server.new_name()), config, film("a", 1, "Alien", secret="hunter2"))
    assert "strict_dynamic_mapping_exception" in refusal.reason
    assert "hunter2" not in refusal.reason


def test_a_new_field_is_added_in_place(opensearch_server: OpenSearchServer, client: OpenSearch, config: Config) -> None:
    name = opensearch_server.new_name()
    put(index(name), config, film("a", 1, "Alien"))
    assert put(index(name, FilmWithYear), config, film("b", 2, "Aliens", year=1986)) == []
    assert client.indices.get_alias(name=name).keys() == {f"{name}-000001"}
    assert read_back(index(name), config).keys() == {"a", "b"}


def test_a_changed_type_is_rebuilt_with_versions_and_tombstones_while_readers_search(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    name = opensearch_server.new_name()
    keys = {str(number) for number in range(2_500)}
    put(index(name), config, *(film(key, 5, "1") for key in keys), film("gone", 7, None))
    stop, seen, faults = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(client.count(index=name)["count"])
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        changed = index(name, FilmWithNumber)
        assert put(changed, config, film("0", 4, 2), film("gone", 6, 2), film("1", 6, 2)) == []
    finally:
        stop.set()
        reader.join()
    assert (seen, faults) == ({len(keys)}, [])
    bodies = read_back(changed, config)
    assert bodies.keys() == keys
    assert (bodies["0"]["title"], bodies["1"]["title"]) == ("1", 2)
    assert client.indices.get_alias(name=name).keys() == {f"{name}-000002"}
    assert found(client, name, {"range": {"title": {"gte": 2}}}) == {"1"}


def test_documents_that_do_not_fit_leave_everything_as_it_was(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    name = opensearch_server.new_name()
    put(index(name), config, film("a", 5, "1"), film("b", 5, "no number"))
    with pytest.raises(OpenSearchLayoutError, match="1 documents do not fit"):
        index(name, FilmWithNumber).open(app="films", key="film_id", config=config)
    assert found(client, name) == {"a", "b"}
    assert put(index(name), config, film("a", 6, "still written")) == []


@pytest.mark.parametrize("step", ["opensearch.after_copy", "opensearch.after_swap"])
def test_a_rebuild_that_dies_is_done_again_at_the_next_start(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config, step: str
) -> None:
    name = opensearch_server.new_name()
    put(index(name), config, film("a", 5, "1"), film("gone", 5, None))
    with fail_at(step, RuntimeError("dies")), pytest.raises(RuntimeError):
        put(index(name, FilmWithNumber), config)
    assert found(client, name) == {"a"}
    assert put(index(name, FilmWithNumber), config, film("gone", 4, 7), film("b", 6, 7)) == []
    assert found(client, name) == {"a", "b"}
    assert client.indices.get_alias(name=name).keys() == {f"{name}-000002"}
    # Searches may run on the old index still, so a start later removes it.
    assert put(index(name, FilmWithNumber), config) == []
    assert set(client.indices.get(index=f"{name}-*")) == {f"{name}-000002"}


def test_a_name_that_is_an_index_of_something_else_is_left_alone(
    opensearch_server: OpenSearchServer, client: OpenSearch, config: Config
) -> None:
    name = opensearch_server.new_name()
    client.indices.create(index=name)
    with pytest.raises(OpenSearchLayoutError, match="not an alias of ours"):
        index(name).open(app="films", key="film_id", config=config)
