"""A real Redis, Debian's, with a password."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from deltaworks.testing.postgres import free_port

PASSWORD = "the-secret-of-redis"


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server on 127.0.0.1."""

    port: int

    def url(self, port: int | None = None) -> str:
        """Its address, or that of a gate before it."""
        return f"redis://:{PASSWORD}@127.0.0.1:{port or self.port}/0"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole run, in memory."""
    folder = tempfile.mkdtemp(prefix="deltaworks-redis-")
    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "requirepass": PASSWORD}
    command = ["redis-server", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        server = RedisServer(port)
        _wait(server)
        yield server
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: RedisServer) -> None:
    import redis  # noqa: PLC0415

    deadline = time.monotonic() + 30
    with redis.Redis.from_url(server.url()) as client:
        while True:
            try:
                client.ping()
                return
            except redis.exceptions.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
