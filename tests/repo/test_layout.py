"""The house stands as drawn: names, layers, and words that must not appear."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_platform_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "Linux"


@pytest.mark.parametrize("folder", ["assets", "resources", "sensors"])
def test_definition_folders_keep_annotations_as_objects(folder: str) -> None:
    """Dagster reads context annotations at run time; postponed ones are only texts."""
    for file in (ROOT / folder).rglob("*.py"):
        assert "from __future__ import annotations" not in file.read_text(), file


def test_no_room_is_a_drawer() -> None:
    drawers = {"utils", "common", "helpers", "misc", "manager", "base"}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [path for path in tracked.stdout.split() if drawers & set(re.split(r"[/.]", path))]


def test_constraints_name_no_registry() -> None:
    assert "://" not in (ROOT / "requirements" / "constraints.txt").read_text()


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        named = set(re.findall(r"^    make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, (page.name, named - targets)


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
