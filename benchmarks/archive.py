"""The archive of a log beside plain PUT and GET of the same bytes by boto3, on the same S3 server.

    .venv/bin/python benchmarks/archive.py

Sealed segments are uploaded by `deltaworks log archive` (read, checked, hashed, put once, noted) and by `put_object`;
then read as a log through the archive, with nothing here, and fetched by `get_object`. The server is moto in a process
of its own on this machine, so what is compared is our work and not a network: a real store is slower for both. The last
figure is of a store that takes a tenth of a second for every GET, and a reader that works on what it has read.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
from log import GROUP_ROWS, append, batch, seal
from measure import Figure, report

from deltaworks.change import ChangeBatch
from deltaworks.config import LocalLogConfig
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import LocalLog
from deltaworks.testing.postgres import free_port

BUCKET = "archive"
GROUP_TIMES = 30
"""A group is as many times 55 kB: about what capture appends at once where there is much to read."""


GET_S, WORK_S = 0.1, 0.01
"""How long a slow store takes for a GET, and a reader for a group: about as long for all groups of a segment."""

SERVER = """
import sys, time
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

application = DomainDispatcherApplication(create_backend_app)

def answer(environ, respond):
    if environ["REQUEST_METHOD"] == "GET" and "/slow/" in environ["PATH_INFO"]:
        time.sleep(float(sys.argv[2]))
    return application(environ, respond)

make_server("127.0.0.1", int(sys.argv[1]), answer, threaded=True).serve_forever()
"""


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A server that speaks S3, and takes its time below the prefix `slow`; its endpoint."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(port), str(GET_S)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with closing(client(endpoint)) as s3:
                    s3.create_bucket(Bucket=BUCKET)
                break
            except Exception:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def client(endpoint: str) -> Any:  # Any: boto3 makes its clients at run time
    """A boto3 client in a session of its own, as ours; to make one takes half a second, which counts for both."""
    return boto3.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")


def make_log(folder: Path, *, megabytes: int) -> None:
    """A sealed log of about so many megabytes as appended; values are such that zstd has work to do."""
    count = GROUP_ROWS * GROUP_TIMES
    changes = batch(count)
    place = changes.rows.schema.get_field_index("v")
    with LocalLogWriter.open(folder, segment_bytes=16 << 20) as writer:
        while sum(path.stat().st_size for path in folder.glob("*.segment")) < megabytes << 20:
            texts = np.frombuffer(os.urandom(12 * count), "S12")
            values = pa.array([text.hex() for text in texts.tolist()])
            rows = changes.rows.set_column(place, changes.rows.schema.field(place), values)
            append(writer, (ChangeBatch(changes.schema, rows),))
    seal(folder)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def put_plain(endpoint: str, files: list[Path], prefix: str) -> None:
    """PUT each file once, with its checksum, as the archive promises it."""
    with closing(client(endpoint)) as s3:
        for path in files:
            content = path.read_bytes()
            s3.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=content, Metadata={"sha256": sha256(content)}
            )


def get_plain(endpoint: str, files: list[Path], prefix: str, into: Path) -> None:
    """GET each object into a file and compare its checksum."""
    into.mkdir()
    with closing(client(endpoint)) as s3:
        for path in files:
            found = s3.get_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}")
            content = found["Body"].read()
            if sha256(content) != found["Metadata"]["sha256"]:
                raise ValueError(path.name)
            (into / path.name).write_bytes(content)


def sha256(content: bytes) -> str:
    """The checksum of an object."""
    return hashlib.sha256(content).hexdigest()


def turn(endpoint: str, source: Path, folder: Path, number: int) -> dict[str, float]:
    """Seconds of each, and the bytes that went over the wire."""
    shutil.copytree(source, folder)
    files = sorted(folder.glob("*.sealed"))
    settings = LocalLogConfig.model_validate(
        {"max_bytes": 1, "archive": {"bucket": BUCKET, "prefix": f"ours-{number}", "endpoint": endpoint}}
    )
    log = LocalLog("bench", folder, settings, cache=folder.with_name(f"cache-{number}"))
    found = {"bytes": float(sum(path.stat().st_size for path in files))}
    prefix = f"plain-{number}"
    found["put"] = seconds(lambda: put_plain(endpoint, files, prefix))
    found["archive"] = seconds(log.archive)
    expected = read_all(log)
    found["get"] = seconds(lambda: get_plain(endpoint, files, prefix, folder.with_name(f"plain-{number}")))
    log.retire(read_up_to={})
    if len(list(folder.glob("*.sealed"))) > 0:
        raise ValueError("segments were not removed here")
    found["read"] = seconds(lambda: read_all(log, expected))
    found["read again"] = seconds(lambda: read_all(log, expected))
    return found | slow_turn(endpoint, source, folder.with_name(f"slow-{number}"), expected)


def slow_turn(endpoint: str, source: Path, folder: Path, expected: int) -> dict[str, float]:
    """Seconds of a reader that works, through an archive that is slow and out of the cache."""
    shutil.copytree(source, folder)
    archive = {"bucket": BUCKET, "prefix": f"slow/{folder.name}", "endpoint": endpoint}
    settings = LocalLogConfig.model_validate({"max_bytes": 1, "archive": archive})
    log = LocalLog("bench", folder, settings, cache=folder.with_name(f"{folder.name}-cache"))
    log.archive()
    log.retire(read_up_to={})
    return {
        each: seconds(lambda: read_all(log, expected, work_s=WORK_S)) for each in ("slow and work", "cached and work")
    }


def read_all(log: LocalLog, expected: int | None = None, *, work_s: float = 0.0) -> int:
    """Read the log from its start, with so much work on each group; the changes."""
    changes = 0
    for group in log.reader().read(after_sequence=-1):
        changes += sum(len(each) for each in group.batches)
        if work_s:
            time.sleep(work_s)
    if expected not in (None, changes):
        raise ValueError(f"{changes} changes where {expected} are expected")
    return changes


def main() -> int:
    """Run both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="at least three")
    parser.add_argument("--megabytes", type=int, default=256, help="of the log as appended")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    asked = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark")
    with tempfile.TemporaryDirectory(prefix="deltaworks-archive-") as name:
        folder = Path(name)
        make_log(folder / "made", megabytes=asked.megabytes)
        with s3_server(folder) as endpoint:
            turns = [turn(endpoint, folder / "made", folder / f"log-{each}", each) for each in range(asked.repeats)]
    return report("archive of a log", figures(turns), path=asked.json)


def figures(turns: list[dict[str, float]]) -> list[Figure]:
    """Rates of the bytes that lie in the archive, and ratios."""

    def rate(what: str) -> list[float]:
        return [each["bytes"] / each[what] / 1e6 for each in turns]

    def ratio(ours: str, theirs: str) -> list[float]:
        return [each[theirs] / each[ours] for each in turns]

    return [
        Figure(name="put_object", values=rate("put"), unit="MB/s"),
        Figure(name="log archive", values=rate("archive"), unit="MB/s"),
        Figure(name="log archive ÷ put_object", values=ratio("archive", "put"), unit="of its rate"),
        Figure(name="get_object to a file, checked", values=rate("get"), unit="MB/s"),
        Figure(name="read through the archive, decoded", values=rate("read"), unit="MB/s"),
        Figure(name="read through ÷ get_object", values=ratio("read", "get"), unit="of its rate"),
        Figure(name="read again, out of the cache", values=rate("read again"), unit="MB/s"),
        Figure(
            name="a reader that works, slow store ÷ out of the cache",
            values=ratio("slow and work", "cached and work"),
            unit="of its rate",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
