"""The film search's delay: from a commit in PostgreSQL until the film is searchable, at 1,000 changes per second.

    database ─► capture ─► log ─► process (Talent Service) ─► index      no Dagster, no page
                    every film whose votes changed is asked for in the index itself, a hundred times a second

Beside it stands how long the database itself takes to show the same votes to who asks as often: the least that can be
measured so.
"""

import argparse
import itertools
import os
import signal
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from measure import Figure, report

from deltaworks.capture.dump import DumpState
from deltaworks.config import Config
from deltaworks.log.change_log import LogReader
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE
from deltaworks.log.registry import open_reader
from deltaworks.log.status import log_status
from deltaworks.position import Lsn
from deltaworks.schema import TableName
from deltaworks.store.search import SearchReader
from resources import environment
from studio import database, watcher
from studio.services import Services, answers
from studio.updates import Commit, apply_updates
from studio.watcher import Look, VotesWatcher, database_look

ROOT = Path(__file__).resolve().parent.parent
APP, SOURCE = "movie_search", "studio"
RATE, SECONDS, REPEATS = 1_000, 30.0, 3
ASK_EVERY_S = 0.01
ASKED_SHARE = 20
"""Of so many commits the database is asked for one: the answers cost the time of what is measured."""


@contextmanager
def index_look(config: Config) -> Iterator[Look]:
    """What the index on disk shows to a process that reads it; a film is asked for once after each of its commits."""
    reader = SearchReader(config.index_folder(APP))
    asked: dict[int, datetime] = {}

    def look(movie_ids: Sequence[int]) -> dict[int, int]:
        # Between two commits an index shows nothing new, and asking again would take the time that is measured.
        freshness = reader.freshness()
        if freshness is None:
            return {}
        wanted = [movie_id for movie_id in movie_ids if asked.get(movie_id) != freshness.flushed_at]
        asked.update(dict.fromkeys(wanted, freshness.flushed_at))
        bodies = [hit.body for hit in reader.documents(wanted)] if wanted else []
        return {int(body["movie_id"]): (body.get("rating") or {}).get("votes") or 0 for body in bodies}

    yield look


def run(home: Path, *, rate: float, seconds: float) -> dict[str, float]:
    """Start everything in a folder, stream, and give the lags in milliseconds."""
    path = home / "deltaworks.yaml"
    path.write_text((ROOT / "deltaworks.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    port, talent_port = _free_port(), _free_port()
    # Ports of its own, so that a studio which runs on this machine is left alone.
    os.environ["STUDIO_DSN"] = f"postgresql://studio@127.0.0.1:{port}/studio"
    os.environ["TALENT_URL"] = f"http://127.0.0.1:{talent_port}"
    config = environment.config(path)
    dsn = config.source(SOURCE).dsn.get_secret_value()
    talent = str(config.app(APP).settings["talent_url"])
    deltaworks = [str(Path(sys.executable).with_name("deltaworks"))]
    with Services(home / "logs", environment={**os.environ, "DELTAWORKS_CONFIG": str(path)}) as services:
        command = [sys.executable, "-m", "studio.database", "run", "--folder", str(home / "postgres")]
        services.start("database", [*command, "--port", str(port)])
        services.wait("database", until=lambda: _is_loaded(dsn), timeout_s=120)
        services.start("talent", [sys.executable, "-m", "studio.talent", "--port", str(talent_port)])
        services.wait("talent", until=answers(f"{talent}/health"), timeout_s=30)
        services.start("capture", [*deltaworks, "capture", SOURCE])
        services.start("process", [*deltaworks, "process", APP])
        lock = config.app_folder(APP) / LOCK_FILE
        services.wait("process", until=lambda: holder_of(lock) is not None, timeout_s=120)
        reader = SearchReader(config.index_folder(APP))
        log = open_reader(config, SOURCE)
        services.wait("capture", until=lambda: _is_dumped(config, log), timeout_s=300)
        # Whatever the dump brought has to be searchable before the clock starts.
        target = log.end().position
        services.wait("process", until=lambda: _reached(reader, target), timeout_s=300)
        return _stream(config, dsn, rate=rate, seconds=seconds)


def _stream(config: Config, dsn: str, *, rate: float, seconds: float) -> dict[str, float]:
    # The demo asks ten times a second, which would be most of what is measured here.
    watcher.ASK_EVERY_S = ASK_EVERY_S
    with (
        index_look(config) as in_index,
        database_look(dsn) as in_database,
        VotesWatcher(in_index, name="index") as searchable,
        VotesWatcher(in_database, name="database") as committed,
    ):
        commits = itertools.count()

        def watch(commit: Commit) -> None:
            searchable.expect(commit)
            if next(commits) % ASKED_SHARE == 0:
                committed.expect(commit)

        done = apply_updates(dsn, rate=rate, seconds=seconds, on_commit=watch)
        # Films that are drafts or withdrawn by now are not listed, so nothing can show their votes.
        with database.connect(dsn) as connection:
            unlisted = connection.execute("select movie_id from movie where status in ('draft', 'withdrawn')")
            searchable.forget({movie_id for (movie_id,) in unlisted})
        searchable.wait(timeout_s=20.0)
        lags, least = sorted(searchable.lags_s), sorted(committed.lags_s)
    return {
        "p50": statistics.median(lags) * 1e3,
        "p99": lags[len(lags) * 99 // 100] * 1e3,
        "least_p50": statistics.median(least) * 1e3,
        "rate": done.changes_per_s,
        "seen": len(lags),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _is_loaded(dsn: str) -> bool:
    try:
        return database.is_loaded(dsn)
    except database.DatabaseNotReachableError:
        return False


def _is_dumped(config: Config, log: LogReader) -> bool:
    tables = [TableName.parse(table) for table in config.source(SOURCE).tables]
    dumps = [table.dump for table in log_status(SOURCE, log, tables=tables, service=None).tables]
    return all(dump is not None and dump.state == DumpState.DONE.value for dump in dumps)


def _reached(reader: SearchReader, target: Lsn) -> bool:
    freshness = reader.freshness()
    return freshness is not None and freshness.position >= target and len(reader.newest(limit=10)) == 10


def main() -> int:
    """Repeat, each time from an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    # Stopped from outside, it stops what it started, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="deltaworks-") as folder:
            Path(folder).chmod(0o755)
            runs.append(run(Path(folder), rate=options.rate, seconds=options.seconds))
    figures = [
        Figure(name="commit → searchable, p50", values=[each["p50"] for each in runs], unit="ms", goal=150),
        Figure(name="commit → searchable, p99", values=[each["p99"] for each in runs], unit="ms", goal=500),
        Figure(name="commit → seen in the database, p50", values=[each["least_p50"] for each in runs], unit="ms"),
        Figure(
            name="changes committed",
            values=[each["rate"] for each in runs],
            unit="changes/s",
            goal=options.rate * 0.98,
            smaller_is_better=False,
        ),
        Figure(name="commits watched", values=[each["seen"] for each in runs], unit=""),
    ]
    return report("Search lag", figures, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
