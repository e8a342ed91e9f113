"""The server over real HTTP."""

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from log.appending import append
from serve.conftest import ALIEN, HOSTILE, InProcess, Server, config_of, write_index

from deltaworks.config import AppConfig, Config, ConfigError
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import Lsn
from deltaworks.serve.http import NoAppToServeError, build, run
from deltaworks.serve.worker import PortInUseError

StartServer = Callable[[Path], Server]


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_it_is_healthy(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}


def test_search_answers_with_documents_and_their_versions(client: httpx.Client) -> None:
    answer = client.get("/api/search", params={"q": "sigourney ali", "limit": 5}).json()
    assert (answer["query"], answer["total"], answer["is_close"]) == ("sigourney ali", 1, False)
    (hit,) = answer["hits"]
    assert hit["key"] == "348"
    assert hit["version"] == {"position": "0/64", "ordinal": 0}
    assert hit["body"] == ALIEN
    assert hit["score"] > 0
    assert answer["took_ms"] >= 0


@pytest.mark.parametrize("query", ["", "((((", '"', "title:", "\x00", "a" * 2_000, "AND OR NOT", "*", "🎬"])
def test_no_query_is_an_error(client: httpx.Client, query: str) -> None:
    for path in ("/api/search", "/", "/results"):
        assert client.get(path, params={"q": query}).status_code == 200


def test_a_limit_that_cannot_be_is_named(client: httpx.Client) -> None:
    for limit in ("0", "1000", "many"):
        answer = client.get("/api/search", params={"q": "alien", "limit": limit})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["query", "limit"]


def test_documents_are_looked_up_by_key(client: httpx.Client) -> None:
    keys = [("key", "666"), ("key", "348"), ("key", "nobody")]
    documents = client.get("/api/documents", params=keys).json()["documents"]
    assert [document["key"] for document in documents] == ["666", "348"]
    assert documents[0]["body"] == HOSTILE
    assert client.get("/api/documents").status_code == 422


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    client.get("/api/search", params={"q": "alien"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'deltaworks_index_documents{app="movie_search"} 2.0' in answer.text
    assert 'deltaworks_index_lag_seconds{app="movie_search"} 0.0' in answer.text
    assert "deltaworks_search_seconds_count" in answer.text
    assert 'deltaworks_capture_changes_total{source="' in answer.text
    # Nobody asked the source, so nothing is said of it.
    assert "deltaworks_capture_up{" not in answer.text


def test_files_of_the_page_are_served_and_nothing_else(client: httpx.Client) -> None:
    assert client.get("/static/page.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/static/page.css").headers["content-type"].startswith("text/css")
    for path in ("/static/../http.py", "/static/%2e%2e/http.py", "/static/", "/docs"):
        assert client.get(path).status_code == 404


def test_the_page_may_load_from_here_only(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for asset in ("/", "/static/page.js", "/static/page.css"):
        assert "https://" not in client.get(asset).text


def test_it_serves_before_index_and_log_exist_and_follows_them(tmp_path: Path) -> None:
    client = InProcess(build(config_of(tmp_path)))
    status = client.get("/api/status").json()
    assert (status["is_ready"], status["index_position"], status["lag_changes"]) == (False, None, 0)
    assert "Nothing is indexed yet" in status["text"]
    page = client.get("/", params={"q": "alien"})
    assert (page.status_code, "The index does not exist yet" in page.text) == (200, True)
    assert client.get("/api/search", params={"q": "alien"}).json()["hits"] == []
    assert client.get("/api/documents", params={"key": "1"}).json() == {"documents": []}
    assert 'deltaworks_index_ready{app="movie_search"} 0.0' in client.get("/metrics").text

    # The log gets five changes in two groups, the index has the first group.
    with LocalLogWriter.open(config_of(tmp_path).log_folder("studio")) as log:
        append(log, [1, 2])
        append(log, [3, 4, 5])
        log.append(Group(batches=(), position=Lsn(9), previous_position=Lsn(2)))
    write_index(config_of(tmp_path), ALIEN, position=1)

    wait_for(lambda: client.get("/api/status").json()["is_ready"])
    behind = client.get("/api/status").json()
    assert (behind["index_position"], behind["log_position"]) == ("0/1", "0/9")
    assert (behind["document_count"], behind["lag_changes"], behind["log_changes"]) == (1, 3, 5)
    assert 0 < behind["lag_s"] < 60
    assert "3 changes behind" in behind["text"]
    assert abs((datetime.fromisoformat(behind["committed_at"]) - datetime.now(UTC)).total_seconds()) < 60
    assert client.get("/api/search", params={"q": "alien"}).json()["total"] == 1

    write_index(config_of(tmp_path), ALIEN | {"title": "Aliens"}, position=9)
    wait_for(lambda: client.get("/api/status").json()["lag_changes"] == 0)
    assert client.get("/api/status").json()["lag_s"] == 0
    assert client.get("/api/search", params={"q": "aliens"}).json()["total"] == 1


def test_a_damaged_log_is_an_answer_and_not_a_crash(tmp_path: Path) -> None:
    with LocalLogWriter.open(config_of(tmp_path).log_folder("studio")) as log:
        append(log, [1])
    segment = next(config_of(tmp_path).log_folder("studio").glob("*.segment"))
    segment.write_bytes(b"x" + segment.read_bytes()[1:])
    client = InProcess(build(config_of(tmp_path)))
    answer = client.get("/api/status")
    assert answer.status_code == 503
    assert "cannot read group 0" in answer.json()["detail"]
    assert client.get("/health").status_code == 200


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"port {port}.*serve\.port"):
            run(config_of(tmp_path, port=port))


def test_it_stops_when_asked_and_leaves_no_worker_on_the_port_however_it_ends(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(tmp_path)
    assert server.stop() == 0
    again = Server(server.config).wait()
    os.kill(again.process.pid, signal.SIGKILL)
    again.process.wait(10)

    def is_free() -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", server.config.serve.port))
            except OSError:
                return False
            return True

    wait_for(is_free)


def test_the_app_to_serve_has_to_be_clear(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    other = AppConfig(module="studio.other:app", source="studio")
    both = config.model_copy(update={"apps": {**config.apps, "other": other}})
    with pytest.raises(NoAppToServeError, match="movie_search, other"):
        build(both)
    build(both.model_copy(update={"serve": config.serve.model_copy(update={"app": "other"})}))
    unknown: Config = config.model_copy(update={"serve": config.serve.model_copy(update={"app": "nobody"})})
    with pytest.raises(ConfigError, match="nobody"):
        build(unknown)
