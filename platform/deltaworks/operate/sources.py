"""How sources are captured now; asks the log and the source, and nothing behind them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deltaworks.config import Config
from deltaworks.log.registry import log_of
from deltaworks.log.status import CaptureStatus, read_status
from deltaworks.operate.log import opened


def capture_status(config: Config, source: str) -> CaptureStatus:
    """A source, its log, its tables, dumps and slot; a source that does not answer is a status that says so."""
    log = log_of(config, source)
    with opened(config, source) as database:
        return read_status(
            database,
            log.near_reader(),
            tables=config.source(source).table_names,
            service=log.holder(),
            archive=log.archived(),
            is_full=log.is_full(),
        )


def capture_statuses(config: Config) -> Sequence[CaptureStatus]:
    """All sources, asked at once, so that several that do not answer cost no more than one."""
    with ThreadPoolExecutor(max_workers=len(config.sources)) as threads:
        return list(threads.map(lambda source: capture_status(config, source), config.sources))
