"""The proof that nothing is lost: check what the log holds against what its reader saw."""

from collections.abc import Callable

from deltaworks.config import Config
from deltaworks.log.registry import open_reader
from deltaworks.log.verify import LogVerification
from deltaworks.log.verify import verify_log as verify
from deltaworks.operate.log import OnProgress


def verify_log(config: Config, log: str, *, on_progress: OnProgress | None = None) -> LogVerification:
    """Check the change log of a source, or of an app that writes to the lake, from its first group to now.

    Raises:
        ConfigError: no source or app has that name.
        CorruptLogError: a group cannot be read at all.
    """
    if log not in config.apps:
        config.source(log)
    return verify(open_reader(config, log), on_group=_group_progress(log, on_progress))


def _group_progress(log: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(f"{log}: groups of the log", done, total)
