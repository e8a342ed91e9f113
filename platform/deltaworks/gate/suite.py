"""Suites of expectations as people write them: YAML with Great Expectations' own names.

    suites:
      - name: movie_key
        description: Every film has one row.
        data: studio.movie              # the lake table the suite is about
        expectations:
          - expect_column_values_to_not_be_null: {column: movie_id}
          - expect_column_values_to_be_unique: {column: movie_id}
      - name: credit_has_film
        description: Every credit belongs to a film.
        data: studio.credit
        query: select ... from lake.studio.credit ...   # what to look at instead of the whole table
        blocking: false                 # report, but let the release go on; true when left out
        expectations:
          - expect_table_row_count_to_equal: {value: 0}

Reading a file does not import Great Expectations, which takes seconds.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deltaworks.errors import TerminalError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TABLE = re.compile(r"[a-z][a-z0-9_]*\.[A-Za-z_]\w*")
_KEYS = ("name", "description", "data", "query", "blocking", "expectations")


class SuiteFileError(TerminalError):
    """The file with expectations cannot be used; the message lists every fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """One expectation: Great Expectations' name and the arguments as written."""

    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def column(self) -> str | None:
        """The column it is about; `None` for a table, a pair or a list of columns."""
        column = self.arguments.get("column")
        return column if isinstance(column, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Expectations on one table, or on what one query finds. `data` is the table as `schema.table`."""

    name: str
    description: str
    data: str
    expectations: tuple[Expectation, ...]
    query: str | None = None
    is_blocking: bool = True


def load_suites(path: Path) -> tuple[Suite, ...]:
    """Read and check a file of suites, in its order.

    Raises:
        SuiteFileError: the file is missing, is not YAML, or has faults; all of them are listed.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SuiteFileError(
            f"cannot find the expectations {str(path)!r}; write them there or mend the path"
        ) from error
    except yaml.YAMLError as error:
        raise SuiteFileError(f"cannot read {str(path)!r} as YAML: {error}") from error
    written = document.get("suites") if isinstance(document, dict) else None
    if not isinstance(written, list):
        raise SuiteFileError(f"cannot use {str(path)!r}: expected a mapping with a list 'suites'")
    faults = [fault for at, suite in enumerate(written) for fault in _faults(suite, f"suites[{at}]")]
    if not faults:
        names = Counter(suite["name"] for suite in written)
        faults = [f"{name}: {count} suites have this name" for name, count in names.items() if count > 1]
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise SuiteFileError(f"cannot use {str(path)!r}, {len(faults)} to mend:\n{listing}")
    return tuple(_suite(suite) for suite in written)


def _faults(suite: Any, place: str) -> list[str]:  # Any: YAML is any JSON-like value
    if not isinstance(suite, dict):
        return [f"{place}: expected a mapping with {', '.join(_KEYS)}"]
    name = suite.get("name")
    place = name if isinstance(name, str) and name else place
    faults = [f"{place}: unknown key {key!r}; known: {', '.join(_KEYS)}" for key in suite if key not in _KEYS]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        faults.append(f"{place}.name: expected lower-case letters, digits and _, got {name!r}")
    if not isinstance(suite.get("description"), str) or not suite["description"].strip():
        faults.append(f"{place}.description: expected a sentence that says what is promised")
    if not isinstance(suite.get("data"), str) or not _TABLE.fullmatch(suite["data"]):
        faults.append(f"{place}.data: expected schema.table of the lake, got {suite.get('data')!r}")
    if not isinstance(suite.get("query", ""), str):
        faults.append(f"{place}.query: expected SQL text")
    if not isinstance(suite.get("blocking", True), bool):
        faults.append(f"{place}.blocking: expected true or false, got {suite['blocking']!r}")
    return faults + _expectation_faults(suite.get("expectations"), f"{place}.expectations")


def _expectation_faults(written: Any, place: str) -> list[str]:  # Any: as above
    if not isinstance(written, list) or not written:
        return [f"{place}: expected a list of at least one expectation"]
    return [
        f"{place}[{at}]: expected one `expect_…: {{argument: value}}`, got {item!r:.60}"
        for at, item in enumerate(written)
        if not _is_expectation(item)
    ]


def _is_expectation(item: Any) -> bool:  # Any: as above
    if not isinstance(item, dict) or len(item) != 1:
        return False
    [(name, arguments)] = item.items()
    return isinstance(name, str) and name.startswith("expect_") and (arguments is None or isinstance(arguments, dict))


def _suite(written: Mapping[str, Any]) -> Suite:
    items: Sequence[Mapping[str, Any]] = written["expectations"]
    return Suite(
        name=written["name"],
        description=" ".join(written["description"].split()),
        data=written["data"],
        query=written.get("query"),
        is_blocking=written.get("blocking", True),
        expectations=tuple(
            Expectation(type=name, arguments=dict(arguments or {}))
            for item in items
            for name, arguments in item.items()
        ),
    )
