"""What every command shares: its options, its two outputs, the configuration, and how it is stopped."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltaworks import config as configuration
from deltaworks.config import Config

out = Console()
err = Console(stderr=True)

ConfigFile = Annotated[
    Path,
    typer.Option("--config", envvar="DELTAWORKS_CONFIG", help="The configuration file.", show_default=True),
]
SourceName = Annotated[str, typer.Argument(help="A source of the configuration.")]
AppName = Annotated[str, typer.Argument(help="An app of the configuration.")]
UntilNow = Annotated[bool, typer.Option("--until-now", help="Stop when everything up to now is done.")]
DEFAULT_CONFIG = Path("deltaworks.yaml")


def load_config(path: Path) -> Config:
    """The configuration, checked; `${NAME}` comes from the environment."""
    return configuration.load(path, environment=os.environ)


def stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set, so that a service ends between two groups."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def byte_text(count: int | None) -> str:
    """A number of bytes for people."""
    return "unknown" if count is None else decimal(count)


def second_text(seconds: float | None) -> str:
    """A span of time for people."""
    return "unknown" if seconds is None else f"{seconds:,.1f} s"


class Bars:
    """Progress bars on a terminal, one per thing that is worked on; quiet elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _advance(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=max(total, done))  # type: ignore[arg-type]
