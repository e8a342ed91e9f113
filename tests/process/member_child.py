"""Starts members of the app `films` as forked processes, each with a home of its own as on a machine of its own.

`member_child.py BROKERS TOPICS FOLDER SINK URL`; each line on stdin, `NAME`, starts a member, and is answered by
`NAME PID`. SIGTERM lets a member leave in good order. Forking spares each of them the imports.
"""

import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import confluent_kafka  # noqa: F401  # once, not in every member
import structlog
from process.film_app import film_app
from process.shared_table import SharedTable

from deltaworks.config import Config
from deltaworks.process.runner import Runner

SHARES = 6


def config_of(brokers: str, topics: str, home: Path, url: str) -> Config:
    log = {
        "kind": "kafka",
        "brokers": brokers,
        "topics": topics,
        "member_timeout_s": 6,
        "patience_s": 120,
    }
    source = {"kind": "postgres", "dsn": "none", "tables": ["film"], "log": log}
    app = {"module": "none:none", "source": "studio", "settings": {"url": url}, "shares": SHARES}
    return Config.model_validate({"home": str(home), "sources": {"studio": source}, "apps": {"films": app}})


def follow(name: str, brokers: str, topics: str, folder: Path, sink: Path, url: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with (folder / f"{name}.out").open("a") as out:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(out))
        config = config_of(brokers, topics, folder / name, url)
        app = film_app(SharedTable(sink, writer=name))
        with Runner.open(app, config=config, name="films") as runner:
            runner.follow(stop)


if __name__ == "__main__":
    brokers, topics, folder, sink, url = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        member = line.strip()
        child = os.fork()
        if child == 0:
            try:
                follow(member, brokers, topics, Path(folder), Path(sink), url)
            except BaseException as error:
                with (Path(folder) / f"{member}.out").open("a") as said:
                    said.write(f"failed: {error!r}\n")
                os._exit(1)
            os._exit(0)
        os.write(1, f"{member} {child}\n".encode())
