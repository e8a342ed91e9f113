"""Dagster's definitions load, and are the ones that stand in `assets.txt`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SNAPSHOT = Path(__file__).with_name("assets.txt")

LISTING = """
from assets.definitions import defs

graph = defs.resolve_asset_graph()
for key in sorted(graph.get_all_asset_keys(), key=str):
    node = graph.get(key)
    parents = " ".join(sorted(parent.to_user_string() for parent in node.parent_keys)) or "-"
    owners = " ".join(node.owners) or "-"
    assert node.description, f"{key} has no description"
    assert node.kinds, f"{key} has no kind"
    print(f"{key.to_user_string()} | {node.group_name} | {owners} | {parents}")
"""


def run(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DAGSTER_HOME": str(home), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_assets_have_owners_kinds_descriptions_and_the_parents_that_were_reviewed(tmp_path: Path) -> None:
    """To accept a change, write the new listing: `DELTAWORKS_REWRITE=1 pytest tests/definitions`."""
    done = run(sys.executable, "-c", LISTING, home=tmp_path)
    assert done.returncode == 0, done.stderr
    if "DELTAWORKS_REWRITE" in os.environ:
        SNAPSHOT.write_text(done.stdout)
    assert done.stdout == SNAPSHOT.read_text()


@pytest.mark.parametrize(
    "command", [("dagster", "definitions", "validate", "--workspace", "workspace.yaml"), ("dg", "check", "defs")]
)
def test_the_definitions_pass_dagsters_own_checks_with_no_service_running(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    done = run(str(BIN / command[0]), *command[1:], home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
