"""Runs the cases with "change": setup, changes, and what capture made of them."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from judging import Outcome, judge
from outcome import Event, Sink, read_events
from place import Database, fresh_database

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.testing.postgres import PostgresServer

SOURCE = "conformance"
PUBLICATION = "conformance"
_RENAMED = re.compile(r"alter table \S+ rename to", re.IGNORECASE)


def run_data_case(case: Mapping[str, Any], server: PostgresServer) -> list[str]:
    """Run a case in each of its modes; every difference from what it expects."""
    differences: list[str] = []
    rows_of_mode: dict[str, Any] = {}
    for mode in case.get("modes", ["log"]):
        with fresh_database(server) as database, home() as folder:
            outcome = _run(case, database, folder, is_dump=mode == "dump")
            rows_of_mode[mode] = {str(table): _sorted(outcome.sink, table) for table in outcome.sink.tables}
            found = judge(_of_mode(case["expect"], mode), outcome)
            differences += [f"{mode}: {each}" if len(case.get("modes", ())) > 1 else each for each in found]
    if len(rows_of_mode) == 2 and rows_of_mode["log"] != rows_of_mode["dump"]:
        differences.append(f"dump value ≠ log value: {rows_of_mode['dump']} and {rows_of_mode['log']}")
    return differences


@contextmanager
def home() -> Iterator[Path]:
    """A folder for the product's state."""
    with tempfile.TemporaryDirectory(prefix="deltaworks-conformance-") as folder:
        yield Path(folder)


def config_of(database: Database, folder: Path, **settings: Any) -> Config:
    """The product's configuration that captures this database."""
    source = {"kind": "postgres", "dsn": database.dsn, "slot": database.name, "publication": PUBLICATION, **settings}
    return Config.model_validate({"home": str(folder), "sources": {SOURCE: source}})


def tables_setting(case: Mapping[str, Any], database: Database) -> list[str]:
    """The tables of the case, as the configuration names them."""
    if "publication" not in case:
        names = [str(table) for table in database.user_tables(roots=False)]
        # A table that gets another name is followed where a pattern holds for that too.
        return [*names, "public.*"] if _RENAMED.search(str(case.get("change"))) else names
    named = re.match(r"for table (?:only )?([\w\", .]+?)(?: with|$)", case["publication"], re.IGNORECASE)
    if named is None:
        return [str(table) for table in database.user_tables(roots=True)]
    return [name.strip() for name in named.group(1).split(",")]


def prepare(case: Mapping[str, Any], database: Database) -> None:
    """Run the setup, and create the publication where the case has one of its own."""
    for statement in case.get("setup", ()):
        database.run(statement)
    if "publication" in case or "change" in case:
        database.run(f"create publication {PUBLICATION} {case.get('publication', 'for all tables')}")


def _run(case: Mapping[str, Any], database: Database, folder: Path, *, is_dump: bool) -> Outcome:
    prepare(case, database)
    config = config_of(database, folder, tables=tables_setting(case, database))
    if is_dump:
        _change(case, database)
    operate.capture(config, SOURCE)
    before = operate.capture(config, SOURCE).offset
    if not is_dump:
        _change(case, database)
        operate.capture(config, SOURCE)
    events = read_events(config.log_folder(SOURCE))
    return Outcome(
        database=database,
        sink=_applied(events),
        events=[event for event in events if is_dump or event.offset >= before],
    )


def _change(case: Mapping[str, Any], database: Database) -> None:
    for statement in case["change"]:
        for setting in case.get("session", ()):
            database.run(setting)
        database.run(statement)


def _applied(events: Sequence[Event]) -> Sink:
    sink = Sink()
    for event in events:
        sink.apply(event)
    return sink


def _of_mode(expected: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """A dump has rows, and no events of the changes that made them."""
    return {name: value for name, value in expected.items() if mode == "log" or name not in ("events",)}


def _sorted(sink: Sink, table: Any) -> list[Any]:
    return sorted(sink.rows(table), key=str)
