"""Kinds of sources by the name they have in `deltaworks.yaml`; a new one is one line here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.postgres.warm import compile_loops
from deltaworks.capture.source import Source
from deltaworks.config import ConfigError, PostgresConfig


class _Kind(Protocol):
    """Makes a source of a kind."""

    def __call__(self, name: str, config: PostgresConfig, /, *, folder: Path | None) -> Source: ...


_KINDS: Mapping[str, _Kind] = {
    "postgres": PostgresSource,
}


def open_source(name: str, config: PostgresConfig, *, folder: Path | None = None) -> Source:
    """The source of that name; connects to nothing yet.

    In `folder` it keeps what is too large for memory, and the bytes of messages that nobody can read;
    without one the former goes to the system's folder for temporary files, and the latter nowhere.

    Raises:
        ConfigError: unknown kind; the message lists those that are known.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"no source kind {config.kind!r} (source {name!r}); known: {', '.join(_KINDS)}")
    return _KINDS[config.kind](name, config, folder=folder)


def warm_up(config: PostgresConfig) -> None:
    """Do now what would hold up the first changes of such a source: compile its loops."""
    if config.kind == "postgres":
        compile_loops()
        if config.stream_format == "binary":
            compile_loops(in_binary=True)
