"""`deltaworks audit`: what it prints, and its exit codes."""

import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proof.shop import bring_through, fill, of_group
from rich.console import Console
from servers.postgres import Database
from typer.testing import CliRunner, Result

from deltaworks import faults, operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config
from deltaworks.operate.balance_sheet import balance_sheet
from deltaworks.testing.faults import lose_at


def audit(path: Path, *options: str) -> Result:
    return CliRunner().invoke(command_line, ["audit", "shop", *options, "--config", str(path)])


def lose_item_five(config: Config, database: Database) -> None:
    """Capture and process ten items; the load of them does not get item 5."""
    operate.capture(config, "shop")
    fill(database, 10)
    operate.capture(config, "shop")
    operate.process(config, "items")
    gone: list[int] = []
    with lose_at("load.read", lambda groups: [of_group(group, {5}, gone) for group in groups]):
        operate.load(config, "shop")
    operate.load(config, "items")
    assert gone == [5]


def test_a_source_that_lost_nothing_is_balanced_and_ends_with_0(
    config_file: Path, config: Config, database: Database
) -> None:
    fill(database, 10)
    bring_through(config)

    done = audit(config_file)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "in = out"
    assert audit(config_file, "--incidents").output == ""
    sheet = json.loads(audit(config_file, "--json").output)
    assert sheet["is_balanced"]
    assert [hop["hop"] for hop in sheet["hops"]] == ["log", "lake", "app items", "log items", "lake items"]
    assert all(hop["in"] == hop["out"] for hop in sheet["hops"])
    assert [sink["missing"] for sink in sheet["sinks"]] == [0, 0]


def test_the_sheet_tells_the_filtered_from_the_gone(config: Config, database: Database) -> None:
    fill(database, 10)
    bring_through(config)
    database.execute("delete from item where id = 9", "update item set kind = 0 where id = 8")
    bring_through(config)
    stood = operate.audit(config, "shop").entities["items"]
    counts = [sum(getattr(each, name) for each in stood) for name in ("entities", "left", "filtered", "gone")]
    # Kinds 0, 1 and 2 are filtered out: items 1, 2, 10, and 8 now.
    assert counts == [10, 5, 4, 1]


def test_a_loss_ends_with_1_until_it_is_repaired(config_file: Path, config: Config, database: Database) -> None:
    lose_item_five(config, database)

    done = audit(config_file)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "in ≠ out"
    told = audit(config_file, "--json")
    assert told.exit_code == 1
    (summary,) = json.loads(told.output)["open_incidents"]
    assert "lake, 1 changes of public.item, 1 keys: open" in summary
    # What is told of a loss has no keys; the incident's file has them.
    assert "item 5" not in done.output

    repaired = audit(config_file, "--repair")
    assert repaired.exit_code == 1
    assert repaired.output.splitlines()[-1] == summary.replace(": open", ": repaired")
    bring_through(config)
    assert audit(config_file).exit_code == 0
    # The windows of the hop lack the change for ever, and the sheet says that it is no loss any more.
    sheet = io.StringIO()
    Console(file=sheet, width=200).print(*balance_sheet(operate.audit(config, "shop"), minutes=5), sep="\n")
    assert re.search(r"9 of 10, repaired|10 of 11, repaired", sheet.getvalue())
    listed = audit(config_file, "--incidents")
    assert listed.exit_code == 0
    assert listed.output.splitlines() == [summary.replace(": open", ": repaired")]


@pytest.mark.parametrize("option", ["--json", "--incidents"])
def test_an_unknown_source_is_named_with_those_that_are_known(config_file: Path, option: str) -> None:
    done = CliRunner().invoke(command_line, ["audit", "shoe", option, "--config", str(config_file)])
    assert done.exit_code == 1
    assert "no source 'shoe'" in str(done.exception)
    assert "shop" in str(done.exception)


def test_two_audits_at_one_moment_record_a_loss_once(config: Config, database: Database) -> None:
    lose_item_five(config, database)
    both_know = threading.Barrier(2)
    faults.arm("audit.before_incidents", lambda: both_know.wait(timeout=60) and None)
    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(operate.audit, config, "shop") for _ in range(2)]
        found = [incident.id for look in looks for incident in look.result().found]
    assert [incident.id for incident in operate.incidents(config, "shop")] == found
    assert len(found) == 1
