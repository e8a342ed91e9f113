"""Follows a local log with the app `films`, in one forked process after the other.

Each line on stdin, `HOME SINK URL`, starts a process. It says `ready PID`, and when it has ended, `ended CODE`. Forking
spares each of them the imports.
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import structlog
from process.film_app import film_app
from process.material import TableSink, config_in

from deltaworks.process.runner import Runner


def say(word: str, number: int) -> None:
    sys.stdout.write(f"{word} {number}\n")
    sys.stdout.flush()


def follow(home: str, sink: str, url: str) -> None:
    config = config_in(Path(home), url=url)
    with Runner.open(film_app(TableSink(Path(sink))), config=config, name="films") as runner:
        say("ready", os.getpid())
        runner.follow(threading.Event())


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            follow(*line.split())
            os._exit(0)
        say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
