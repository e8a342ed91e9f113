"""Retention beside a service: see `retention`, which imports the lake and the apps and is not wanted in its memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context

import structlog

from deltaworks.beside import beside
from deltaworks.config import Config, LocalLogConfig
from deltaworks.errors import DeltaworksError

EVERY_S = 300.0
"""How often the capture service looks what need not be kept any more."""

logger = structlog.get_logger(__name__)


@contextmanager
def retiring(config: Config, source: str, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Do it every `every_s` beside a service, in a short-lived process: the service's own memory stays small.

    What goes wrong is said in the log of the service and tried again; it never stops the service.
    """
    settings = config.source(source).log
    if not isinstance(settings, LocalLogConfig) or settings.is_kept_whole:
        yield
        return
    with beside(partial(_retire_until, config, source, every_s), name="retention"):
        yield


def _retire_until(config: Config, source: str, every_s: float, stop: threading.Event) -> None:
    while True:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(_retire, config, source).result()
        except (DeltaworksError, OSError, RuntimeError) as error:
            logger.warning("the log was not cleared of what need not be kept", source=source, error=str(error))
        if stop.wait(every_s):
            return


def _retire(config: Config, source: str) -> None:
    import_module("deltaworks.operate.retention").retire_log(config, source)
