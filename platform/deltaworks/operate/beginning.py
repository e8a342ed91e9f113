"""Begin a reader in a log that was shortened: at its first group, with a dump of what it would otherwise miss.

retired ┆ group 41 ── 42 ── … ── reads of the dump ──►
┆ └ the reader begins here, and has every row once the dump has gone by
"""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.change_log import GroupHeader
from deltaworks.log.registry import open_reader
from deltaworks.operate.dump import ask
from deltaworks.operate.lake import open_lake
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.place import take_folder
from deltaworks.process.registry import load_app
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.state import State
from deltaworks.store.load import begin_load, last_load


class BeginError(TerminalError):
    """A reader cannot begin in the middle of a log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A reader whose next group is `sequence`; it is whole when it has read the rows of the dump."""

    reader: str
    sequence: int
    dump: str


def begin_lake(config: Config, source: str) -> Begun:
    """Let the lake read a source's log from the oldest group that is kept, and ask for a dump of all its tables.

    Raises:
        BeginError: the log is whole, or something of it was loaded before.
    """
    config.source(source)
    oldest = _oldest(config, source)
    with open_lake(config) as lake:
        if last_load(lake, source).sequence >= 0:
            raise BeginError(
                f"cannot begin to load {source!r}: the lake has rows of it that may be gone by now; drop schema "
                f"lake.{source} and its row in lake.deltaworks.load, then run this again"
            )
        # First the dump: dying in between makes one too many, and never a lake that lacks rows.
        dump = ask(config, source)
        begin_load(lake, source, oldest)
    return Begun(reader="lake", sequence=oldest.sequence, dump=dump)


def begin_app(config: Config, app: str) -> Begun:
    """Let an app read its source's log from the oldest group that is kept, and ask for a dump of its tables.

    Raises:
        BeginError: the log is whole, the app is shared, or it has read something before.
        AppHeldError: it runs at this moment.
    """
    settings = config.app(app)
    oldest, loaded = _oldest(config, settings.source), load_app(config, app)
    if settings.shares is not None:
        raise BeginError(f"cannot begin app {app!r} in the middle of a log: several processes share it")
    folder, lock = take_folder(config.app_folder(app), app, is_shared=False)
    try:
        with closing(State.open(Path(folder) / STATE_FILE, loaded)) as state:
            if state.checkpoint().sequence >= 0:
                raise BeginError(
                    f"cannot begin app {app!r}: its stores may have rows that are gone by now; remove "
                    f"{str(folder)!r} and what its sinks hold, then run this again"
                )
            dump = ask(config, settings.source, [str(table.name) for table in loaded.tables])
            with state.folding():
                state.save_checkpoint(
                    Checkpoint(sequence=oldest.sequence - 1, offset=oldest.offset, position=oldest.previous_position)
                )
    finally:
        os.close(lock)
    return Begun(reader=f"app {app}", sequence=oldest.sequence, dump=dump)


def _oldest(config: Config, source: str) -> GroupHeader:
    oldest = open_reader(config, source).oldest()
    if oldest is None or oldest.sequence == 0:
        raise BeginError(f"cannot begin in the middle of the log of {source!r}: it has its first group, or none yet")
    return oldest
