"""Which part of a source's log is no longer needed: how far its readers are, by their own durable checkpoints."""

import os
from contextlib import suppress
from pathlib import Path

from deltaworks.config import Config, LocalLogConfig
from deltaworks.log.registry import log_of, open_reader
from deltaworks.log.retention import Retired
from deltaworks.operate.lake import open_lake_if_there
from deltaworks.process.checkpoint import read_checkpoint
from deltaworks.process.runner import STATE_FILE
from deltaworks.store.load import last_load

LAKE = "lake"
"""What the lake is called among the readers of a log."""


def read_up_to(config: Config, source: str) -> dict[str, int]:
    """The last group of a source's log that each of its readers is done with; -1 for one that has not begun.

    Every app counts, and the lake, which reads every log. So does capture while it owes deletes of rows that went in a
    gap: it looks for their keys in the whole log.
    """
    reached = {
        f"app {name}": _durable_sequence(config.app_folder(name) / STATE_FILE)
        for name, app in config.apps.items()
        if app.source == source
    }
    with open_lake_if_there(config) as lake:
        reached[LAKE] = -1 if lake is None else last_load(lake, source).sequence
    if open_reader(config, source).end().progress.get("sweeps"):
        reached["capture"] = -1
    return reached


def retire_log(config: Config, source: str) -> Retired:
    """Remove what the log's settings do not keep and every reader is done with. Any process may, at any time.

    Raises:
        ConfigError: no source has that name.
    """
    settings = config.source(source).log
    if isinstance(settings, LocalLogConfig) and settings.is_kept_whole:
        oldest = open_reader(config, source).oldest()
        return Retired(oldest_sequence=oldest.sequence if oldest is not None else 0)
    return log_of(config, source).retire(read_up_to=read_up_to(config, source))


def _durable_sequence(state: Path) -> int:
    """How far an app is, also after a power cut.

    An app does not sync what it can repeat, and it could not repeat what is removed here. What was read is in one of
    these files, and SQLite itself syncs the second before it moves anything from there into the first.
    """
    sequence = read_checkpoint(state).sequence
    for file in (state.with_name(f"{state.name}-wal"), state):
        with suppress(FileNotFoundError):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return sequence
