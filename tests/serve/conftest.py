"""A real server over a real index and a real log."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deltaworks.config import AppConfig, Config, PostgresConfig, ServeConfig
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document
from deltaworks.store.search import Display, Fact, SearchIndex, SearchWriter
from deltaworks.testing.postgres import free_port

APP = "movie_search"
SPEC = SearchIndex(
    "movies",
    text={"title": 4.0, "directors.name": 1.5, "cast.name": 1.5},
    popularity="rating.votes",
    display=Display(
        title="title",
        line=(Fact("year", "year"), Fact("rated", "certificate"), Fact("runtime", "runtime_min", "{:.0f} min")),
        tags=("genres",),
        facts=(Fact("IMDb", "rating.imdb", "{:.1f}"), Fact("votes", "rating.votes", "{:,}")),
        people=(Fact("directed by", "directors.name"), Fact("with", "cast.name")),
        details=(Fact("released", "released_on"), Fact("box office", "distribution.box_office_usd", "${:,.0f}")),
    ),
)
ALIEN: dict[str, Any] = {
    "movie_id": 348,
    "title": "Alien",
    "year": 1979,
    "certificate": "R",
    "runtime_min": 117.0,
    "released_on": "1979-05-25",
    "genres": ["Horror", "Sci-Fi"],
    "rating": {"imdb": 8.5, "votes": 900_000},
    "distribution": {"distributor": "20th Century Fox", "box_office_usd": 81900459},
    "directors": [{"person_id": 1, "name": "Ridley Scott"}],
    "cast": [
        {"person_id": number, "name": name}
        for number, name in enumerate(
            (
                *("Bolaji Badejo", "Harry Dean Stanton", "Helen Horton", "Ian Holm", "John Hurt"),
                *("Sigourney Weaver", "Tom Skerritt", "Veronica Cartwright", "Yaphet Kotto"),
            )
        )
    ],
}
HOSTILE: dict[str, Any] = {
    "movie_id": 666,
    "title": '<script>alert(1)</script> & "quotes" \'n',
    "year": "<img src=x onerror=alert(2)>",
    "genres": ["<b>bold</b>"],
    "rating": {"imdb": "<i>8</i>", "votes": None},
    "directors": [{"name": "Eve <iframe> O'Nil"}],
    "cast": [],
}


def config_of(home: Path, *, port: int = 8400) -> Config:
    return Config(
        home=home,
        sources={"studio": PostgresConfig(kind="postgres", dsn="host=nowhere", tables=("movie",))},  # type: ignore[arg-type]
        apps={APP: AppConfig(module="studio.movie_search:movies", source="studio")},
        serve=ServeConfig(port=port),
    )


def write_index(config: Config, *bodies: dict[str, Any], position: int = 100) -> None:
    writer: SearchWriter = SPEC.open(app=APP, key="movie_id", config=config)
    writer.write(
        [
            Document(
                key=body["movie_id"],
                version=Version(Lsn(position), number),
                committed_at=datetime.now(UTC),
                body=body,
            )
            for number, body in enumerate(bodies)
        ]
    )
    writer.flush(up_to=Lsn(position))
    writer.close()


class InProcess:
    """Asks the application in this process, as a browser on this machine does."""

    def __init__(self, application: FastAPI, *, client: str = "127.0.0.1", host: str = "127.0.0.1:8400") -> None:
        self._application, self._client, self._host = application, client, host

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._application, client=(self._client, 1))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{self._host}") as client:
                return await client.request(method, path, headers=dict(headers or {}), **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)


class Server:
    """`run(config)` in a process of its own, as `deltaworks serve` has it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{config.serve.port}"
        code = (
            "import sys; from deltaworks.config import Config; from deltaworks.serve.http import run\n"
            "run(Config.model_validate_json(sys.argv[1]))"
        )
        self.output = config.home / "serve.out"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, config.model_dump_json()], stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self) -> "Server":
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", timeout=5)
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return self
        self.stop()
        raise AssertionError(f"the server did not start: {self.output.read_text()}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[[Path], Server]]:
    """Starts a server on a home folder; it is stopped when the tests end."""
    with ExitStack() as stack:

        def start(home: Path) -> Server:
            server = Server(config_of(home, port=free_port()))
            stack.callback(server.stop)
            return server.wait()

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[[Path], Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server over two films, one of them hostile."""
    home = tmp_path_factory.mktemp("home")
    write_index(config_of(home), ALIEN, HOSTILE)
    return start_server(home)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client
