"""The `deltaworks` command: every service and every job, one word each."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltaworks import config as configuration
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError

app = typer.Typer(
    name="deltaworks",
    help="Keep every derived store in step with its source, provably.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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


def main() -> None:
    """Run the command; an error on purpose is one message and exit code 1, never a traceback."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer() if not sys.stderr.isatty() else structlog.dev.ConsoleRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    try:
        app()
    except DeltaworksError as error:
        err.print(f"deltaworks: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


@app.command()
def check(source: SourceName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """List everything that keeps SOURCE from being captured, with the statement that mends it."""
    from deltaworks import operate

    findings = operate.check(_load(config), source)
    for finding in findings:
        out.print(f"• {finding.what}\n    {finding.mend}", markup=False, highlight=False)
    out.print(f"{source}: ready" if not findings else f"{source}: {len(findings)} to mend", highlight=False)
    if findings:
        raise typer.Exit(1)


@app.command()
def capture(source: SourceName, until_now: UntilNow = False, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Keep the change log of SOURCE in step with its database, until stopped."""
    from deltaworks import operate

    settings = _load(config)
    if until_now:
        with _bars() as bars:
            out.print(operate.capture(settings, source, on_progress=bars).summary, highlight=False)
        return
    operate.follow_capture(settings, source, stop=_stop_on_signal())


@app.command()
def process(app_name: AppName, until_now: UntilNow = False, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run the app APP_NAME over its source's log, until stopped."""
    from deltaworks import operate

    settings = _load(config)
    if until_now:
        with _bars() as bars:
            out.print(operate.process(settings, app_name, on_progress=bars).summary, highlight=False)
        return
    operate.follow_process(settings, app_name, stop=_stop_on_signal())


@app.command()
def load(log: Annotated[str, typer.Argument(help="A source or an app.")], config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Bring the lake to the end of a log, all tables in one commit."""
    from deltaworks import operate

    out.print(operate.load(_load(config), log).summary, highlight=False)


@app.command()
def verify(source: SourceName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Compare SOURCE with the lake at one position, row by row."""
    from deltaworks import operate

    verification = operate.verify(_load(config), source)
    table = Table("table", "source rows", "lake rows", "differing", title=f"{source} at {verification.position}")
    for verdict in verification.tables:
        table.add_row(verdict.table, f"{verdict.source_rows:,}", f"{verdict.lake_rows:,}", f"{verdict.differing:,}")
    out.print(table)
    out.print("source = lake" if verification.is_equal else "source ≠ lake", highlight=False)
    if not verification.is_equal:
        raise typer.Exit(1)


@app.command()
def serve(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Serve the search page and the JSON API, until stopped."""
    from deltaworks.serve import http

    http.run(_load(config))


@app.command()
def status(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Show how far every log, app and lake has got."""
    from deltaworks import operate

    table = Table("what", "position", "offset", "state")
    for row in operate.status(_load(config)):
        table.add_row(row.what, row.position, row.offset, row.state)
    out.print(table)


def _load(path: Path) -> Config:
    return configuration.load(path, environment=os.environ)


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set, so that a service ends between two groups."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class _bars:  # noqa: N801  # used as a context manager and callback, reads as a verb
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


if __name__ == "__main__":
    main()
