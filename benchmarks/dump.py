"""Dumps beside `COPY … (format binary)` to /dev/null, and what a dump costs the writers of its database.

The reader and its limit take turns on one server, so that a busy machine slows both. pgbench runs beside
the capture service alone, then beside a service that dumps without a pause.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from measure import Figure, report

from deltaworks.capture.pace import Pace
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.config import PostgresConfig
from deltaworks.log import recorder
from deltaworks.log.dump_requests import DumpRequest, DumpRequests
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.schema import TableName
from deltaworks.testing.postgres import PostgresServer, embedded_binaries

EVENT = TableName("public", "event")
WRITTEN = ("pgbench_accounts", "pgbench_branches", "pgbench_tellers")

MADE = """
create table event (
  id bigint primary key, device int, name text, amount numeric(12,2), at timestamptz, is_valid boolean);
insert into event
select g, g % 1000, 'event ' || g, g * 1.01, timestamptz '2020-01-01' + g * interval '1 s', g % 2 = 0
from generate_series(1, {rows}) g;
vacuum (analyze, freeze) event;
"""


def copied(server: PostgresServer) -> float:
    """Seconds that psql takes to throw a binary copy of the table away."""
    copy = [embedded_binaries() / "psql", server.dsn(), "-Xqc", "copy event to stdout (format binary)"]
    began = time.monotonic()
    subprocess.run(copy, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def read_in_chunks(source: PostgresSource) -> tuple[float, int]:
    """Seconds that the same rows take by key range into Arrow, as a dump reads them, and how many they are."""
    began, pace, after, rows = time.monotonic(), Pace.first(most_rows=source.chunk_rows), None, 0
    last = source.last_key(EVENT) or ()
    while True:
        chunk = source.chunk(EVENT, after_key=after, up_to_key=last, limit=pace.limit)
        rows += len(chunk.rows)
        pace = pace.after(row_count=chunk.scanned, took_s=chunk.took_s, budget_s=source.chunk_s)
        if chunk.last_key is None:
            return time.monotonic() - began, rows
        after = chunk.last_key


def source_of(server: PostgresServer, *tables: str) -> PostgresSource:
    """A source over the benchmark's database."""
    settings = {"kind": "postgres", "dsn": server.dsn(), "tables": tables}
    return PostgresSource("benchmark", PostgresConfig.model_validate(settings))


def dumped_into_log(server: PostgresServer, folder: Path) -> float:
    """Seconds that a whole dump takes into the durable log, with marks and groups."""
    requests = DumpRequests(folder / "dumps")
    with source_of(server, "event", *WRITTEN) as source, LocalLogWriter.open(folder / "log") as writer:
        reader = LocalLogReader(folder / "log")
        recorder.drain(source, writer, reader)
        requests.ask(DumpRequest.new(["event"]))
        began = time.monotonic()
        recorder.drain(source, writer, reader, requests=requests)
        return time.monotonic() - began


@contextmanager
def service(server: PostgresServer, folder: Path, *, dumps: bool) -> Iterator[None]:
    """The capture service, dumping the table again and again where it `dumps`."""
    stop, requests = threading.Event(), DumpRequests(folder / "dumps")

    def run() -> None:
        with source_of(server, "event", *WRITTEN) as source, LocalLogWriter.open(folder / "log") as writer:
            recorder.follow(source, writer, LocalLogReader(folder / "log"), stop=stop, requests=requests)

    def keep_dumping() -> None:
        while not stop.wait(0.02):
            if not requests.open():
                requests.ask(DumpRequest.new(["event"]))

    threads = [threading.Thread(target=run), *([threading.Thread(target=keep_dumping)] if dumps else [])]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for request in requests.open():
            (folder / "dumps" / f"{request.id}.request.json").unlink()


def pgbench(server: PostgresServer, *, seconds: int, rate: int | None = None) -> float:
    """Transactions a second of the standard script with two clients, as many as they can or at a rate."""
    command = [embedded_binaries() / "pgbench", "-n", "-c", "2", "-j", "1", "-T", str(seconds), server.dsn()]
    limited = [*command[:1], "-R", str(rate), *command[1:]] if rate else command
    done = subprocess.run(limited, capture_output=True, text=True, check=True)
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    return float(found[1]) if found else 0.0


def main() -> int:
    """Repeat every comparison in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="at least three")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table")
    parser.add_argument("--seconds", type=int, default=6, help="of each run of pgbench")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    rates: list[float] = []
    ratios: list[float] = []
    whole: list[float] = []
    free: list[float] = []
    paced: list[float] = []
    with tempfile.TemporaryDirectory(prefix="deltaworks-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        settings = {"fsync": "off", "shared_buffers": "512MB", "max_wal_size": "4GB"}
        with PostgresServer.start(folder / "data", settings=settings) as server:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                for statement in MADE.format(rows=options.rows).split(";\n"):
                    if statement.strip():
                        connection.execute(statement)  # type: ignore[arg-type]  # text of this file
            subprocess.run(
                [embedded_binaries() / "pgbench", "-i", "-q", "-s", "5", server.dsn()], capture_output=True, check=True
            )
            with source_of(server, "event", *WRITTEN) as source:
                read_in_chunks(source)  # compiles, and warms the server's buffers
                for _ in range(options.repeats):
                    limit = copied(server)
                    took, rows = read_in_chunks(source)
                    assert rows == options.rows
                    rates.append(rows / took)
                    ratios.append(limit / took)
            whole += [
                options.rows / dumped_into_log(server, folder / f"log-{number}") for number in range(options.repeats)
            ]
            (folder / "service").mkdir()
            with service(server, folder / "service", dumps=False):
                half = int(pgbench(server, seconds=options.seconds) / 2)
            for _ in range(options.repeats):
                found: dict[tuple[bool, int | None], float] = {}
                for rate in (None, half):
                    for dumps in (False, True):
                        with service(server, folder / "service", dumps=dumps):
                            found[dumps, rate] = pgbench(server, seconds=options.seconds, rate=rate)
                free.append(found[True, None] / found[False, None])
                paced.append(found[True, half] / found[False, half])
    figures = [
        Figure(name="rows into Arrow, by chunks of the key", values=rates, unit="rows/s"),
        Figure(
            name="… of COPY binary to /dev/null", values=ratios, unit="of its rate", goal=0.75, smaller_is_better=False
        ),
        Figure(name="a whole dump into the durable log", values=whole, unit="rows/s"),
        Figure(
            name="pgbench at half its pace beside a dump",
            values=paced,
            unit="of beside the bare stream",
            goal=0.95,
            smaller_is_better=False,
        ),
        Figure(name="pgbench as fast as it can, both cores taken", values=free, unit="of beside the bare stream"),
    ]
    return report("Dumps", figures, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
