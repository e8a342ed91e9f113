"""Make a source's log anew from its archive, and say which readers have read more than it has.

    archive  ── 0 ──── 1 ──── 2 ─┆ lost ┆           the log goes on behind group 2 with what capture finds
    reader   ────────────────────────► 4            has read what is lost: it must not take the new 3 and 4 for read

A reader knows its place in the log by number and position, so one that is ahead refuses to go on, also when the log
has grown past its number. It begins anew: all groups are in the archive.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from deltaworks.config import Config
from deltaworks.log.archive.restore import Restored
from deltaworks.log.registry import log_of
from deltaworks.operate.retention import read_up_to


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredLog:
    """A log that is there again; `ahead` are the readers that have read groups which it has not, and the last one."""

    source: str
    log: Restored
    ahead: Mapping[str, int]


def restore_log(config: Config, source: str) -> RestoredLog:
    """Make the log of a source anew from its archive. Capture then goes on where it ends, if the source still can.

    Raises:
        ConfigError: no source has that name.
        LogThereError: the log is there; nothing was touched.
        DeltaworksError: see `LogPlace.restore`.
    """
    config.source(source)
    restored = log_of(config, source).restore()
    ahead = {reader: sequence for reader, sequence in read_up_to(config, source).items() if sequence > restored.last}
    return RestoredLog(source=source, log=restored, ahead=ahead)
