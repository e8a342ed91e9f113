"""The documented role can do all that Deltaworks does with a source, and can write nothing."""

import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from flows.chain import ROOT, wait
from psycopg import errors
from servers.postgres import Database

from deltaworks import operate
from deltaworks.capture.source import Severity
from deltaworks.config import Config, PostgresConfig
from deltaworks.testing.postgres import free_port


@pytest.fixture
def shop(database: Database, tmp_path: Path) -> Iterator[Config]:
    """Two tables with rows, and a configuration whose role does not exist yet."""
    database.execute(
        'create schema "Sales"',
        'create table "Sales".item (id int primary key, name text)',
        "create table customer (id int primary key, name text)",
        "insert into customer select i, 'name ' || i from generate_series(1, 300) i",
        "insert into \"Sales\".item select i, 'item ' || i from generate_series(1, 300) i",
        "create table secret (id int primary key)",
    )
    role = f"least_{database.name}"
    settings = {
        "kind": "postgres",
        "dsn": database.server.dsn(database.name, user=role),
        "tables": ["customer", '"Sales".item'],
        "slot": database.name,
    }
    yield Config(home=tmp_path / "home", sources={"shop": PostgresConfig.model_validate(settings)})
    database.execute(
        f"select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}'",
        f"drop owned by {role}",
        f"drop role {role}",
    )


def create_role(database: Database, config: Config) -> str:
    """Run what `deltaworks check --sql` prints, as a person would."""
    printed = operate.least_role(config, "shop")
    with database.connect() as connection:
        connection.execute(printed)  # type: ignore[call-overload]
    return f"least_{database.name}"


def test_role_can_capture_dump_compare_and_check_and_nothing_else(database: Database, shop: Config) -> None:
    role = create_role(database, shop)
    assert [finding.what for finding in operate.check(shop, "shop") if finding.severity is Severity.ERROR] == []

    assert sum(operate.capture(shop, "shop").changes.values()) == 600
    database.execute("update customer set name = 'new' where id <= 50", "delete from customer where id = 300")
    operate.capture(shop, "shop")
    assert operate.dump(shop, "shop", ["customer"], keys=[("7",)]).outcome.missing == ()
    operate.load(shop, "shop")
    assert operate.verify(shop, "shop").is_equal
    assert operate.verify_log(shop, "shop").is_whole
    status = operate.capture_status(shop, "shop")
    assert status.unreachable is None
    assert status.slot is not None
    assert operate.behind(shop, "shop").is_behind is False

    with psycopg.connect(database.server.dsn(database.name, user=role), autocommit=True) as connection:
        for statement in (
            "insert into customer values (999, 'x')",
            "update customer set name = 'x'",
            "delete from customer",
            "truncate customer",
            'insert into "Sales".item values (999)',
            "select * from secret",
            'create table "Sales".mine (id int)',
            "alter table customer add column x int",
            "drop publication deltaworks_shop",
            "create role another",
            "alter system set wal_level = 'minimal'",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement)  # type: ignore[call-overload]


def test_manual_shows_what_is_printed() -> None:
    page = (ROOT / "docs" / "how-to" / "security.md").read_text()
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    printed = operate.least_role(Config.model_validate(yaml.safe_load(settings)), "shop")
    statements = re.sub(r"^--.*\n", "", printed, flags=re.MULTILINE).replace('"', "")
    assert statements.split() == shown.split()


def test_service_runs_as_that_role_and_gives_metrics(database: Database, shop: Config) -> None:
    create_role(database, shop)
    stop, port = threading.Event(), free_port()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with operate.metrics_server(shop, "shop", port=port):
                operate.follow_capture(shop, "shop", stop=stop)
        except BaseException as error:
            failures.append(error)

    service = threading.Thread(target=serve, daemon=True)
    service.start()

    def scraped(pattern: str) -> bool:
        assert not failures, failures
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return re.search(pattern, answer.read().decode()) is not None
        except OSError:
            return False

    try:
        wait(lambda: scraped(r'dump_done\{source="shop",table="public.customer"\} 1.0'), what="the dump")
        wait(lambda: scraped(r'slot_active\{source="shop"\} 1.0'), what="an active slot")
        database.execute("insert into customer values (1000, 'late')")
        wait(lambda: scraped(r'changes_total\{source="shop"\} 601.0'), what="the change")
        with pytest.raises(
            operate.MetricsPortInUseError, match=rf"port {port} of 127\.0\.0\.1 is in use.*metrics_port"
        ):
            operate.metrics_server(shop, "shop", port=port).__enter__()
    finally:
        stop.set()
        service.join(30)
    assert not failures
