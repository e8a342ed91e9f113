"""A password in the configuration comes out nowhere: every command, servers that work and servers that fail."""

import io
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import dagster as dg
import pytest
import structlog
import typer.main
import yaml
from servers.postgres import Database

from assets.captured import captured_tables
from deltaworks import cli
from deltaworks.config import load
from deltaworks.testing.postgres import free_port
from resources.deltaworks_config import DeltaworksConfig

PASSWORD = "hunter2s3cret"

COMMANDS = {
    "app": [["app", "check", "movie_search"], ["app", "explain", "movie_search"]],
    "audit": [["audit", "studio"], ["audit", "studio", "--json"], ["audit", "studio", "--incidents"]],
    "dead": [["dead", "ls", "movie_search"]],
    "log": [["log", "ls"], ["log", "inspect", "studio"], ["log", "tail", "studio"], ["log", "verify", "studio"]],
    "check": [["check", "studio"], ["check", "studio", "--sql"]],
    "capture": [["capture", "studio", "--until-now"]],
    "dump": [["dump", "studio"], ["dump", "studio", "--status"]],
    "load": [["load", "studio"]],
    "process": [["process", "movie_search", "--until-now"]],
    "replay": [["replay", "movie_search", "--from", "0/0"]],
    "serve": [["serve"]],
    "status": [["status"], ["status", "--json"]],
    "verify": [["verify", "studio"], ["verify", "studio", "--log"]],
}
"""Each command in a form that ends by itself; `serve` finds its port taken."""


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Writes a configuration with this connection string."""
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def configure(dsn: str) -> Path:
            path = tmp_path / "deltaworks.yaml"
            settings = {
                "home": str(tmp_path / "home"),
                "sources": {"studio": {"kind": "postgres", "dsn": dsn, "tables": ["t"], "slot": tmp_path.name[:40]}},
                "apps": {"movie_search": {"module": "studio.movie_search:movies", "source": "studio"}},
                "serve": {"port": taken.getsockname()[1]},
            }
            path.write_text(yaml.safe_dump(settings))
            return path

        yield configure


@pytest.fixture
def working(database: Database) -> str:
    database.execute("create table t (id int primary key, v text)", "insert into t values (1, 'a'), (2, 'b')")
    return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{database.server.port}/{database.name}"


def run(command: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that a command prints; its errors are printed as for a person."""
    monkeypatch.setattr(sys, "argv", ["deltaworks", *command, "--config", str(path)])
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            cli.main()
        except SystemExit as end:
            printed.write(f"ended with {end.code}")
        finally:
            structlog.reset_defaults()
    return printed.getvalue()


def check_that_nothing_shows(printed: str, home: Path) -> None:
    assert PASSWORD not in printed
    for file in home.rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes(), file


def test_every_command_is_tried() -> None:
    assert set(COMMANDS) == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_no_command_shows_a_password_of_a_server_that_works(
    configured: Callable[[str], Path], working: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configured(working)
    for command in [form for name in ("check", "capture", *COMMANDS) for form in COMMANDS[name]]:
        printed = run(command, path, monkeypatch)
        assert printed
        check_that_nothing_shows(printed, tmp_path / "home")
    assert PASSWORD not in repr(load(path, environment={}))


FAILING = {
    "no such database": lambda database: f"postgresql://postgres:{PASSWORD}@127.0.0.1:{database.server.port}/ghost",
    "no such role": lambda database: f"postgresql://ghost:{PASSWORD}@127.0.0.1:{database.server.port}/postgres",
    "nobody there": lambda _: f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/postgres",
    "not encrypted": lambda database: (
        f"host=db.example hostaddr=127.0.0.1 port={database.server.port} user=postgres password={PASSWORD}"
    ),
    "an option that is none": lambda _: f"postgresql://postgres:{PASSWORD}@127.0.0.1/postgres?sslmod=require",
    "no connection string": lambda _: f"postgres {PASSWORD} is what it is",
    "a broken address": lambda _: f"postgresql://postgres:{PASSWORD}@[127.0.0.1/postgres",
}


@pytest.mark.parametrize("fault", FAILING)
def test_no_command_shows_a_password_of_a_server_that_fails(
    configured: Callable[[str], Path],
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    path = configured(FAILING[fault](database))
    for command in [form for forms in COMMANDS.values() for form in forms]:
        check_that_nothing_shows(run(command, path, monkeypatch), tmp_path / "home")


@pytest.mark.parametrize("fault", [None, "nobody there", "no such role", "no connection string"])
def test_dagster_keeps_no_password(
    configured: Callable[[str], Path], working: str, database: Database, tmp_path: Path, fault: str | None
) -> None:
    path = configured(working if fault is None else FAILING[fault](database))
    settings = load(path, environment={}).source("studio")
    events = tmp_path / "dagster"
    events.mkdir()
    with dg.instance_for_test(temp_dir=str(events)) as instance:
        result = dg.materialize(
            [captured_tables("studio", settings)],
            instance=instance,
            resources={"deltaworks": DeltaworksConfig(path=str(path))},
            raise_on_error=False,
        )
        assert result.success == (fault is None)
        assert any(file.is_file() for file in events.rglob("*"))
        check_that_nothing_shows("".join(str(event) for event in result.all_events), events)
