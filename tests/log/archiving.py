"""A small log with an archive: filled, read, retired, damaged."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from log.appending import append
from servers.object_store import KEY_ID, SECRET_KEY, Bucket
from typer.testing import CliRunner, Result

from deltaworks.cli import app as command_line
from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import LocalLog, log_of

SEGMENT_BYTES = 4_000


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


def config_of(home: Path, bucket: Bucket, *, seal: bool = True, **archive: Any) -> Config:
    settings = {"bucket": bucket.name, "endpoint": bucket.endpoint, **archive}
    log = {"kind": "local", "keep_bytes": 0, "seal": seal, "archive": settings}
    return Config.model_validate(
        {
            "home": home,
            "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["film"], "log": log}},
            "apps": {"films": {"module": "none:none", "source": "studio", "settings": {"url": "http://127.0.0.1:9"}}},
        }
    )


def log_in(home: Path, bucket: Bucket, *, seal: bool = True, **archive: Any) -> LocalLog:
    log = log_of(config_of(home, bucket, seal=seal, **archive), "studio")
    assert isinstance(log, LocalLog)
    return log


def fill(log: LocalLog, count: int, *, first: int = 0) -> None:
    with LocalLogWriter.open(log.folder, segment_bytes=SEGMENT_BYTES) as writer:
        for number in range(first, first + count):
            append(writer, [number])


def ids(log: LocalLog, after_sequence: int = -1) -> list[int]:
    groups = log.reader().read(after_sequence=after_sequence)
    return [number for group in groups for number in group.batches[0].rows.column("id").to_pylist()]


def retire(log: LocalLog) -> int:
    return log.retire(read_up_to={"lake": 1_000_000}).segments


def version(bucket: Bucket, name: str) -> Any:
    client = bucket.client()
    try:
        found = client.head_object(Bucket=bucket.name, Key=name)
        return found["ETag"], found["LastModified"]
    finally:
        client.close()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cached_bytes(log: LocalLog) -> int:
    """What the cache takes, while files come and go."""
    found = 0
    for path in log.cache.iterdir():
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command_line, [*arguments, "--config", str(path)])
