"""The Movie Service's database: run it, and load the catalogue into it.

    python -m studio.database run      what the Procfile does: start, load if empty, stay until SIGTERM
    python -m studio.database start    in the background; `load`, `status` and `stop` go with it

`load` does nothing on a loaded database and starts over on a half loaded one, so it can be called
at every start. The database holds public film data only: it trusts every local connection.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltaworks.errors import DeltaworksError, RetryableError, TerminalError
from deltaworks.testing.postgres import STOP_TIMEOUT_S, PostgresServer
from studio import catalogue

DEFAULT_PORT = 55432
DEFAULT_FOLDER = Path(".deltaworks/postgres")
DATABASE = "studio"
SUPERUSER = "studio"
TABLES = tuple(catalogue.COLUMNS)
"""The six tables, parents first."""

OnProgress = Callable[[str, int, int], None]
"""Called with the table being loaded, rows done so far and rows in all; both counts are over all tables."""

_ROWS_PER_CALL = 5_000
_LOADER_LOCK = 7_305_032_118_440_271_001  # Any number no other advisory lock of this database uses.


class DatabaseNotReachableError(RetryableError):
    """Nothing answers at the address of the studio's database."""


class NotOursError(TerminalError):
    """The database has tables of these names that this loader did not make; they are left alone."""


class NotRunningError(TerminalError):
    """No server runs on the data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load` did; `was_loaded` says that there was nothing to do, and `dropped` is empty then."""

    was_loaded: bool
    row_counts: Mapping[str, int]
    dropped: Mapping[str, int]
    seconds: float


def default_dsn(port: int = DEFAULT_PORT) -> str:
    """The address of the studio's database on this machine."""
    return f"postgresql://{SUPERUSER}@127.0.0.1:{port}/{DATABASE}"


def create_database(dsn: str) -> None:
    """Create the database that `dsn` names, on its server; a no-op where it exists.

    Raises:
        DatabaseNotReachableError: the server does not answer.
    """
    name = str(conninfo_to_dict(dsn)["dbname"])
    with connect(make_conninfo(dsn, dbname="postgres")) as connection:
        if connection.execute("select from pg_database where datname = %s", [name]).fetchone() is None:
            # A template of its own encoding: the films' titles are in all scripts.
            connection.execute(
                sql.SQL("create database {} encoding 'UTF8' template template0").format(sql.Identifier(name))
            )


def load(dsn: str, *, path: Path | None = None, on_progress: OnProgress | None = None) -> LoadReport:
    """Load every film of `path` (the wheel's file when left out) by COPY, one transaction per table.

    A second loader waits for the first. Row numbers are the same after every load.

    Raises:
        DatabaseNotReachableError: no server answers at `dsn`.
        NotOursError: tables of these names are there already, from elsewhere.
        CatalogueError: the file of films cannot be used.
    """
    started = time.monotonic()
    with connect(dsn) as connection:
        # A session lock: it ends with the connection, however that ends.
        connection.execute("select pg_advisory_lock(%s)", [_LOADER_LOCK])
        if not _is_ours(connection):
            _create_schema(connection, path)
        elif _is_loaded(connection):
            return LoadReport(
                was_loaded=True,
                row_counts=_row_counts(connection),
                dropped={},
                seconds=time.monotonic() - started,
            )
        films = catalogue.read(path)
        tables = sql.SQL(", ").join(map(sql.Identifier, TABLES))
        connection.execute(sql.SQL("truncate {} restart identity cascade").format(tables))
        done = 0
        for table, rows in films.rows.items():
            for count in _copy(connection, table, rows):
                done += count
                if on_progress is not None:
                    on_progress(table, done, films.row_count)
        _finish(connection, films)
        return LoadReport(
            was_loaded=False,
            row_counts=_row_counts(connection),
            dropped=films.dropped,
            seconds=time.monotonic() - started,
        )


def is_loaded(dsn: str) -> bool:
    """Whether the whole catalogue is in.

    Raises:
        DatabaseNotReachableError: no server answers at `dsn`.
    """
    with connect(dsn) as connection:
        return _is_ours(connection) and _is_loaded(connection)


def row_counts(dsn: str) -> Mapping[str, int]:
    """Rows per table, counted.

    Raises:
        DatabaseNotReachableError: no server answers at `dsn`.
    """
    with connect(dsn) as connection:
        return _row_counts(connection)


@contextmanager
def connect(dsn: str) -> Iterator[psycopg.Connection]:
    """A connection in autocommit mode, closed at the end.

    Raises:
        DatabaseNotReachableError: no server answers at `dsn`.
    """
    try:
        connection = psycopg.connect(dsn, autocommit=True, connect_timeout=5)
    except psycopg.OperationalError as error:
        where = conninfo_to_dict(dsn)
        raise DatabaseNotReachableError(
            f"cannot reach the studio's database {where.get('dbname')!r} at "
            f"{where.get('host', 'localhost')}:{where.get('port', 5432)}: {str(error).strip().splitlines()[-1]}; "
            "start it with `python -m studio.database run`, or set STUDIO_DSN"
        ) from error
    with connection:
        yield connection


def _is_ours(connection: psycopg.Connection) -> bool:
    row = connection.execute("select to_regclass('studio_admin.catalogue_load') is not null").fetchone()
    return row == (True,)


def _is_loaded(connection: psycopg.Connection) -> bool:
    row = connection.execute("select finished_at is not null from studio_admin.catalogue_load").fetchone()
    return row == (True,)


def _create_schema(connection: psycopg.Connection, path: Path | None) -> None:
    found = connection.execute(
        "select relname from pg_class where relnamespace = 'public'::regnamespace and relname = any(%s) order by 1",
        [list(TABLES)],
    ).fetchall()
    if found:
        raise NotOursError(
            f"cannot load the catalogue: tables {', '.join(repr(name) for (name,) in found)} are there already "
            "and were made by somebody else; use an empty database"
        )
    # One transaction: either all six tables and the mark of the loader are there, or nothing is.
    with connection.transaction():
        connection.execute(files("studio").joinpath("schema.sql").read_bytes())
        connection.execute(
            "insert into studio_admin.catalogue_load (source_sha256) values (%s)",
            [catalogue.fingerprint(path or catalogue.default_path())],
        )


def _copy(connection: psycopg.Connection, table: str, rows: Sequence[catalogue.Row]) -> Iterator[int]:
    """Copy all rows in one transaction, and say how many after each few thousand."""
    columns = sql.SQL(", ").join(map(sql.Identifier, catalogue.COLUMNS[table]))
    statement = sql.SQL("copy {} ({}) from stdin").format(sql.Identifier(table), columns)
    with connection.transaction(), connection.cursor().copy(statement) as copy:
        for start in range(0, len(rows), _ROWS_PER_CALL):
            part = rows[start : start + _ROWS_PER_CALL]
            for row in part:
                copy.write_row(row)
            yield len(part)


def _finish(connection: psycopg.Connection, films: catalogue.Catalogue) -> None:
    with connection.transaction():
        # COPY brings the numbers along, and the next new row must get the one after them.
        for table, key in (("person", "person_id"), ("credit", "credit_id")):
            connection.execute(
                "select setval(pg_get_serial_sequence(%s, %s), %s)", [table, key, max(len(films.rows[table]), 1)]
            )
        connection.execute(
            "update studio_admin.catalogue_load set finished_at = now(), source_sha256 = %s", [films.sha256]
        )
    connection.execute("analyze")


def _row_counts(connection: psycopg.Connection) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for table in TABLES:
        row = connection.execute(sql.SQL("select count(*) from {}").format(sql.Identifier(table))).fetchone()
        counts[table] = row[0] if row else 0
    return counts


# The command line.

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
_console = Console(stderr=True)

Port = Annotated[int, typer.Option(min=1, max=65535, help="TCP port of 127.0.0.1.")]
Folder = Annotated[Path, typer.Option(help="Data folder of the server.")]
Dsn = Annotated[str | None, typer.Option(envvar="STUDIO_DSN", help="Address of the database, if it is not --port.")]


@app.command()
def run(port: Port = DEFAULT_PORT, folder: Folder = DEFAULT_FOLDER) -> None:
    """Start the server, load the catalogue if it is not in, and stay until SIGTERM or Ctrl-C."""
    _exit_on_signals()
    with PostgresServer.start(folder, port=port, superuser=SUPERUSER) as server:
        create_database(default_dsn(port))
        _load_and_tell(default_dsn(port))
        print(f"studio database ready at {default_dsn(port)}", flush=True)
        # A server that dies takes this command with it: honcho then shows which process failed.
        while server.is_running():
            time.sleep(0.5)
    raise TerminalError(f"the studio's database stopped by itself; see {str(server.log_file)!r}")


@app.command()
def start(port: Port = DEFAULT_PORT, folder: Folder = DEFAULT_FOLDER) -> None:
    """Start the server in the background and create the database; a no-op while it runs."""
    if (running := _running(folder)) is not None:
        if running.port != port:
            raise TerminalError(
                f"cannot start on port {port}: the server of {str(folder)!r} runs on port {running.port}; "
                "stop it first, with `python -m studio.database stop`"
            )
        print(f"already running, process {running.pid}, at {default_dsn(port)}")
        return
    server = PostgresServer.start(folder, port=port, superuser=SUPERUSER)
    create_database(default_dsn(port))
    print(f"started, process {server.pid}, at {default_dsn(port)}; log in {server.log_file}")


@app.command()
def stop(folder: Folder = DEFAULT_FOLDER) -> None:
    """Stop the server that runs on the data folder, and wait until it has ended."""
    running = _running(folder)
    if running is None:
        raise NotRunningError(f"cannot stop: no server runs on {str(folder)!r}")
    os.kill(running.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _running(folder) is not None:
        if time.monotonic() > deadline:
            raise TerminalError(f"cannot stop process {running.pid}: still there after {STOP_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    print(f"stopped, process {running.pid}")


@app.command("load")
def load_command(port: Port = DEFAULT_PORT, dsn: Dsn = None) -> None:
    """Load the catalogue; does nothing when it is in."""
    _load_and_tell(dsn or default_dsn(port))


@app.command()
def status(port: Port = DEFAULT_PORT, dsn: Dsn = None) -> None:
    """Print whether the catalogue is in, and the rows of each table."""
    address = dsn or default_dsn(port)
    if not is_loaded(address):
        print("not loaded; run `python -m studio.database load`")
        raise typer.Exit(1)
    for table, count in row_counts(address).items():
        print(f"{table:<14}{count:>9,}")


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 1."""
    try:
        app()
    except DeltaworksError as error:
        _console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


def _exit_on_signals() -> None:
    """Make SIGTERM and Ctrl-C unwind the stack, so that the server is stopped even in the middle of a load."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def leave(*_: object) -> None:
        # A second signal must not cut the orderly stop short.
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(0)

    for number in signals:
        signal.signal(number, leave)


@dataclass(frozen=True, slots=True)
class _Running:
    pid: int
    port: int


def _running(folder: Path) -> _Running | None:
    """The server of a data folder by its pid file, if that process lives."""
    try:
        lines = (folder / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        pid, port = int(lines[0]), int(lines[3])
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError, IndexError, ValueError):
        return None
    return _Running(pid, port)


def _load_and_tell(dsn: str) -> None:
    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task("films", total=None)
        report = load(
            dsn,
            on_progress=lambda table, done, total: progress.update(
                task, description=table, completed=done, total=total
            ),
        )
    if report.was_loaded:
        print(f"catalogue is in: {report.row_counts['movie']:,} films", flush=True)
        return
    counts = ", ".join(f"{count:,} {table}" for table, count in report.row_counts.items())
    print(f"loaded in {report.seconds:.1f} s: {counts}", flush=True)
    for reason, count in report.dropped.items():
        print(f"  left out {count:,}: {reason}", flush=True)


if __name__ == "__main__":
    main()
