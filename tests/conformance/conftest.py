"""The conformance cases as tests: one server for all of them, a database for each."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaworks.testing.postgres import PostgresServer

# The runner is a program of its own; its modules lie beside it.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def conformance_server(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """PostgreSQL 18, or the one of `--postgres-binaries`."""
    from place import started_server

    with started_server(pytestconfig.getoption("--postgres-binaries")) as server:
        yield server
