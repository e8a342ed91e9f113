"""How sources are captured now; asks the log and the source, and nothing behind them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from deltaworks.config import Config
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE, LocalLogReader
from deltaworks.log.status import CaptureStatus, read_status
from deltaworks.operate.log import opened


def capture_status(config: Config, source: str) -> CaptureStatus:
    """A source, its log, its tables, dumps and slot; a source that does not answer is a status that says so."""
    folder = config.log_folder(source)
    with opened(config, source) as database:
        return read_status(
            database,
            LocalLogReader(folder),
            tables=config.source(source).table_names,
            service=holder_of(folder / LOCK_FILE),
        )


def capture_statuses(config: Config) -> Sequence[CaptureStatus]:
    """All sources, asked at once, so that several that do not answer cost no more than one."""
    with ThreadPoolExecutor(max_workers=len(config.sources)) as threads:
        return list(threads.map(lambda source: capture_status(config, source), config.sources))
