"""What the manual shows is what the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import typer.main
from psycopg.conninfo import make_conninfo
from servers.postgres import Database

from deltaworks import operate
from deltaworks.capture.source import Severity
from deltaworks.cli import app
from deltaworks.config import load

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page, block


def test_every_configuration_in_the_manual_loads(tmp_path: Path) -> None:
    shown = [(page, block) for page, block in fences("yaml") if "sources:" in block]
    assert shown
    for number, (_page, block) in enumerate(shown):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        load(
            path,
            environment={
                "SHOP_DSN": "postgresql://shop",
                "LAKE_PASSWORD": "p",
                "LAKE_KEY_ID": "i",
                "LAKE_SECRET_KEY": "k",
                "WAREHOUSE_DSN": "postgresql://warehouse",
                "LEGACY_PASSWORD": "p",
                "SEARCH_PASSWORD": "p",
                "CACHE_PASSWORD": "p",
                "KAFKA_PASSWORD": "p",
                "PARTNER_SECRET": "a key of the partner",
            },
        )


def test_the_role_of_the_manual_can_capture_load_and_verify_and_nothing_more(
    database: Database, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "how-to" / "your-own-database.md").read_text()
    [statements] = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    [drop_slot] = re.findall(r"`(select pg_drop_replication_slot[^`]*)`", page)
    [settings] = [block for found, block in fences("yaml") if found.name == "your-own-database.md"]
    path = tmp_path / "deltaworks.yaml"
    path.write_text(settings)
    database.execute(
        "create schema billing",
        'create table customer (id int primary key, name text); create table "order" (id int primary key, total money);'
        "create table order_line (order_id int, line int, item text, primary key (order_id, line));"
        "create table billing.invoice (id int primary key, at timestamptz)",
        "insert into customer values (1, 'Ada'); insert into \"order\" values (1, 9.99);"
        "insert into order_line values (1, 1, 'tea'); insert into billing.invoice values (1, now())",
    )
    # Roles belong to the whole server, which other tests use too.
    role_name = f"deltaworks_{database.name}"
    database.execute(re.sub(r"\bdeltaworks\b", role_name, statements))
    try:
        dsn = make_conninfo(database.dsn, user=role_name, password="…")
        config = load(path, environment={"SHOP_DSN": dsn})
        found = operate.check(config, "shop")
        assert [finding.what for finding in found if finding.severity is Severity.ERROR] == []
        operate.capture(config, "shop")
        database.execute("update customer set name = 'Grace'", "delete from order_line")
        operate.load(config, "shop")
        assert operate.verify(config, "shop").is_equal
        with psycopg.connect(dsn, autocommit=True) as role:
            for refused in ("delete from customer", "truncate customer", "create table mine ()"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    role.execute(refused)  # type: ignore[call-overload]
            role.execute(drop_slot)
    finally:
        database.execute(f"drop owned by {role_name}", f"drop role {role_name}")


def test_every_command_in_the_manual_parses() -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    shown = 0
    for page in PAGES:
        for line in re.findall(r"^    (?:\.venv/bin/)?(deltaworks .*)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            if words[0].isupper() or any(word.isupper() for word in words):
                continue  # A line of syntax, as in the reference.
            command = commands[words.pop(0)]
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words, resilient_parsing=False)
            shown += 1
    assert shown >= 5


def test_every_command_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for words in [f"{name} {inner}" for inner in getattr(command, "commands", ())] or [name]:
            assert f"## `deltaworks {words}`" in page


def test_examples_in_docstrings_are_run(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("doctestmodules")
    assert {"platform", "studio"} <= set(pytestconfig.getini("testpaths"))


@pytest.mark.parametrize("word", ["Debezium-compatible", "exactly-once delivery"])
def test_the_manual_promises_nothing_we_do_not_do(word: str) -> None:
    assert not [page for page in PAGES if word in page.read_text()]
