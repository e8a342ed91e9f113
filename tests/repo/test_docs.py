"""What the manual shows is what the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

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
        load(path, environment={"SHOP_DSN": "postgresql://shop"})


def test_every_command_in_the_manual_parses() -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    shown = 0
    for page in PAGES:
        for line in re.findall(r"^    (?:\.venv/bin/)?(deltaworks .*)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            if words[0].isupper() or any(word.isupper() for word in words):
                continue  # A line of syntax, as in the reference.
            commands[words[0]].make_context(words[0], list(words[1:]), resilient_parsing=False)
            shown += 1
    assert shown >= 5


def test_every_command_is_in_the_reference() -> None:
    group = typer.main.get_command(app)
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for name in group.commands:  # type: ignore[attr-defined]
        assert f"## `deltaworks {name}`" in page


def test_examples_in_docstrings_are_run(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("doctestmodules")
    assert {"platform", "studio"} <= set(pytestconfig.getini("testpaths"))


@pytest.mark.parametrize("word", ["Debezium-compatible", "exactly-once delivery"])
def test_the_manual_promises_nothing_we_do_not_do(word: str) -> None:
    assert not [page for page in PAGES if word in page.read_text()]
