"""The Talent Service over HTTP: a real server process over the whole studio."""

import asyncio
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psycopg
import pytest
from servers.postgres import Database

from deltaworks.testing.postgres import free_port
from studio.talent import MAX_IDS, RETRY_AFTER_S, create_app

Service = tuple[subprocess.Popen[bytes], httpx.Client]


@pytest.fixture(scope="module")
def talent(loaded: Database) -> Iterator[httpx.Client]:
    with running(loaded.dsn) as (process, client):
        yield client
        process.terminate()
        assert process.wait(15) == 0


@contextmanager
def running(dsn: str) -> Iterator[Service]:
    """The service as its own process, ended with the block whatever happened in it."""
    port = free_port()
    command = [sys.executable, "-m", "studio.talent", "--port", str(port), "--dsn", dsn]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client,
    ):
        try:
            wait_until_healthy(client, process)
            yield process, client
        finally:
            process.kill()


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            assert client.get("/health").json() == {"status": "ok"}
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the Talent Service did not start")


def test_many_people_are_described_as_the_database_has_them(talent: httpx.Client, loaded: Database) -> None:
    ids = random.Random(3).sample(range(1, 63_000), MAX_IDS)
    answer = talent.post("/people", json={"person_ids": ids})
    assert answer.status_code == 200
    expected = loaded.rows(
        "select person_id, name, born_on, "
        "(select count(distinct movie_id) from credit where credit.person_id = person.person_id) "
        f"from person where person_id in ({', '.join(map(str, ids))}) order by 1"
    )
    assert [tuple(person.values()) for person in answer.json()["people"]] == expected
    assert list(answer.json()["people"][0]) == ["person_id", "name", "born_on", "film_count"]


def test_unknown_and_repeated_numbers_are_no_fault(talent: httpx.Client) -> None:
    ids = [1, 1, 2, -5, 999_999_999, 2**40]
    people = talent.post("/people", json={"person_ids": ids}).json()["people"]
    assert [person["person_id"] for person in people] == [1, 2]
    assert talent.post("/people", json={"person_ids": []}).json() == {"people": []}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"person_ids": list(range(MAX_IDS + 1))}, "person_ids: 501 ids; at most 500 in one request, so split it"),
        ({"person_ids": ["Woody Allen"]}, "person_ids.0: Input should be a valid integer"),
        ({"person_ids": [2**63]}, "person_ids.0: Input should be less than"),
        ({"ids": [1]}, "person_ids: Field required; ids: Extra inputs are not permitted"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(talent: httpx.Client, body: object, message: str) -> None:
    answer = talent.post("/people", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)


def test_a_person_comes_with_their_films_oldest_first(talent: httpx.Client, loaded: Database) -> None:
    [(person_id,)] = loaded.rows("select person_id from person where name = 'Clint Eastwood'")
    person = talent.get(f"/people/{person_id}").json()
    [(film_count,)] = loaded.rows(f"select count(distinct movie_id) from credit where person_id = {person_id}")
    assert (person["name"], person["film_count"], len(person["films"])) == ("Clint Eastwood", film_count, film_count)
    assert [film["year"] for film in person["films"]] == sorted(film["year"] for film in person["films"])
    unforgiven = next(film for film in person["films"] if film["title"] == "Unforgiven" and film["year"] == 1992)
    assert unforgiven["roles"] == ["director", "cast"]


def test_an_unknown_person_is_not_found(talent: httpx.Client) -> None:
    answer = talent.get("/people/999999999")
    assert (answer.status_code, answer.json()) == (404, {"detail": "no person 999999999"})


def test_many_callers_at_once_are_all_answered(talent: httpx.Client) -> None:
    def ask(number: int) -> int:
        person_ids = list(range(number * 50 + 1, number * 50 + 51))
        return len(talent.post("/people", json={"person_ids": person_ids}).json()["people"])

    with ThreadPoolExecutor(16) as callers:
        assert set(callers.map(ask, range(200))) == {50}


def test_broken_connections_are_replaced_without_a_failed_request(talent: httpx.Client, loaded: Database) -> None:
    assert talent.get("/people/1").status_code == 200
    with psycopg.connect(loaded.server.dsn(), autocommit=True) as admin:
        ended = admin.execute(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = %s", [loaded.name]
        ).fetchone()
    assert ended is not None
    assert ended[0] > 0
    assert [talent.get("/people/1").status_code for _ in range(8)] == [200] * 8


def test_a_database_that_is_down_is_503_and_asks_to_come_again() -> None:
    async def answers() -> list[httpx.Response]:
        app = create_app(f"postgresql://studio@127.0.0.1:{free_port()}/studio")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://talent") as client:
            return [
                await client.post("/people", json={"person_ids": [1]}),
                await client.get("/people/1"),
                await client.get("/health"),
            ]

    for answer in asyncio.run(answers()):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == str(RETRY_AFTER_S)
        assert "cannot read the studio's database" in answer.json()["detail"]


def test_a_killed_service_leaves_no_worker_on_the_port(loaded: Database) -> None:
    with running(loaded.dsn) as (process, client):
        port = client.base_url.port
        process.kill()
        process.wait(10)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not can_listen(port):
            time.sleep(0.02)
        assert can_listen(port)


def can_listen(port: int | None) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_port_in_use_is_named_with_the_next_step() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = subprocess.run(
            [sys.executable, "-m", "studio.talent", "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert f"cannot serve on '127.0.0.1' port {port}: Address already in use" in refused.stderr
    assert "choose another with --port" in refused.stderr
