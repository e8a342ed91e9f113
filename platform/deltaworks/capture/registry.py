"""Kinds of sources by the name they have in `deltaworks.yaml`; a new one is one line here."""

from collections.abc import Callable, Mapping

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.postgres.warm import compile_loops
from deltaworks.capture.source import Source
from deltaworks.config import ConfigError, PostgresConfig

_KINDS: Mapping[str, Callable[[str, PostgresConfig], Source]] = {
    "postgres": PostgresSource,
}


def open_source(name: str, config: PostgresConfig) -> Source:
    """The source of that name; connects to nothing yet.

    Raises:
        ConfigError: unknown kind; the message lists those that are known.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"no source kind {config.kind!r} (source {name!r}); known: {', '.join(_KINDS)}")
    return _KINDS[config.kind](name, config)


def warm_up(config: PostgresConfig) -> None:
    """Do now what would hold up the first changes of such a source: compile its loops."""
    if config.kind == "postgres":
        compile_loops()
