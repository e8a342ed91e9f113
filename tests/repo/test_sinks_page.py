"""The manual's table of sinks is what the sinks say of themselves."""

import dataclasses
import re
from pathlib import Path

from deltaworks.process.sink import Capabilities
from deltaworks.store import sinks
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search import SearchIndex
from deltaworks.testing.memory_sink import MemorySink

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "sinks.md"


def said() -> dict[str, Capabilities]:
    """The capabilities of every sink, by the name of its spec."""
    specs = [SearchIndex("x", text={"x": 1.0}), LakeTable("x", schema=dict), MemorySink("x")]
    for name in sinks.__all__:
        spec = getattr(sinks, name)
        needs_schema = name.endswith("Table")
        specs.append(spec("x", connection="x", schema=dict) if needs_schema else spec("x", connection="x"))
    return {type(spec).__name__: spec.capabilities for spec in specs}


def test_the_table_of_the_manual_says_what_the_sinks_say() -> None:
    header, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith(("| sink |", "| `"))
    ]
    names = [column.replace(" ", "_") for column in header[2:]]
    assert set(names) == {item.name for item in dataclasses.fields(Capabilities)}
    shown = {row[0].strip("`"): dict(zip(names, row[2:], strict=True)) for row in rows}
    wanted = {sink: {name: "yes" if getattr(can, name) else "" for name in names} for sink, can in said().items()}
    assert shown == wanted


def test_the_extras_of_the_manual_are_those_of_the_package() -> None:
    project = (PAGE.parents[2] / "pyproject.toml").read_text()
    extras = set(re.findall(r"`\[(\w+)\]`", PAGE.read_text()))
    assert extras == {"mysql", "opensearch", "redis", "kafka"}
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
