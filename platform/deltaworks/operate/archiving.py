"""The archive of a log beside the service that writes it; in a process of its own, which imports boto3 instead."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context

import structlog

from deltaworks.beside import beside
from deltaworks.config import Config, LocalLogConfig
from deltaworks.errors import DeltaworksError
from deltaworks.log.archive.manifest import Archived
from deltaworks.log.registry import log_of

EVERY_S = 10.0
"""How often the service looks whether a segment was closed: two small files are read."""

LATER, MUCH_LATER = 6, 30
"""How many times as long it waits after a fault that may pass, and after one that a person has to mend."""

logger = structlog.get_logger(__name__)


def archive_log(config: Config, source: str) -> Sequence[Archived]:
    """Copy what is closed and not archived of a source's log to its archive; what came there. Any process may.

    Raises:
        ConfigError: no source has that name.
        DeltaworksError: see `LogPlace.archive`.
    """
    config.source(source)
    return log_of(config, source).archive()


@contextmanager
def archiving(config: Config, source: str, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Do it beside a service as long as that holds the log: appends never wait for it.

    What goes wrong is said in the log of the service, in `status` and by a metric, and tried again; it never stops the
    service. A stop ends an upload in its middle: it begins again with the next start.
    """
    settings = config.source(source).log
    if not isinstance(settings, LocalLogConfig) or settings.archive is None:
        yield
        return
    with beside(partial(_archive_until, config, source, every_s), name="archive"):
        yield


def _archive_until(config: Config, source: str, every_s: float, stop: threading.Event) -> None:
    log = log_of(config, source)
    wait_s = every_s
    while not stop.wait(wait_s):
        wait_s = every_s
        status = log.archived()
        # A standby on this machine has the same folder; the one that writes the log archives it.
        if status is None or not status.behind_segments or log.holder() != os.getpid():
            continue
        _run(config, source, stop)
        status = log.archived()
        if status is not None and status.fault is not None and not stop.is_set():
            wait_s = every_s * (MUCH_LATER if status.fault.is_stopped else LATER)
            logger.error(
                "the archive is behind; the log keeps its segments",
                source=source,
                segments=status.behind_segments,
                bytes=status.behind_bytes,
                error=status.fault.error,
            )


def _run(config: Config, source: str, stop: threading.Event) -> None:
    process = get_context("spawn").Process(target=_archive, args=(config, source), name="archive", daemon=True)
    process.start()
    try:
        while process.is_alive() and not stop.is_set():
            process.join(timeout=0.5)
    finally:
        # Every step of it may be the last one.
        process.terminate()
        process.join()
        process.close()


def _archive(config: Config, source: str) -> None:
    # Ctrl-C goes to the whole group of processes; the service decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    # It has left word of what went wrong.
    with suppress(DeltaworksError, OSError):
        log_of(config, source).archive()
