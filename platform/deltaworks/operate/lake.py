"""The lake: load, compare with the source, check, release."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.gate.expectation import Suite, SuiteResult, run_suites
from deltaworks.gate.release import Release, current_release, loaded_positions
from deltaworks.gate.release import release as publish
from deltaworks.log.registry import open_reader
from deltaworks.log.tables import latest_schemas
from deltaworks.operate.log import capture, opened
from deltaworks.position import Lsn
from deltaworks.schema import TableSchema
from deltaworks.store.lake import Lake
from deltaworks.store.load import TableLoad, last_load
from deltaworks.store.load import load as load_log
from deltaworks.store.verify import SAMPLE_KEYS, Verification
from deltaworks.store.verify import verify as compare

MODELED_SCHEMA = "modeled"
"""Where dbt writes the tables that are meant for readers."""


class LakeMovedError(RetryableError):
    """A load came between the checks and the release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTable:
    """A table in the lake: its schema, its rows, and what the load did to it."""

    schema: TableSchema
    rows: int
    done: TableLoad | None

    @property
    def counts(self) -> dict[str, int]:
        """What the load did; zeros where nothing was new."""
        done = self.done
        if done is None:
            return {"changes": 0, "upserted": 0, "deleted": 0}
        return {"changes": done.changes, "upserted": done.upserted, "deleted": done.deleted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The lake after a `load`: all tables of the log, also those with nothing new."""

    log: str
    position: Lsn
    from_offset: int
    to_offset: int
    version: int
    took_s: float
    tables: Sequence[LoadedTable]

    @property
    def places(self) -> dict[str, Any]:
        """Where the load began and ended, as metadata."""
        return {
            "position": str(self.position),
            "from_offset": self.from_offset,
            "to_offset": self.to_offset,
            "lake_version": self.version,
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        changes = self.to_offset - self.from_offset
        place = f"lake version {self.version} at {self.position}"
        return f"{self.log}: {changes:,} changes loaded in {self.took_s:.1f} s, {place}"


def load(config: Config, log: str) -> Loaded:
    """Bring the lake to the end of the log of a source or an app."""
    reader = open_reader(config, log)
    with open_lake(config) as lake:
        report = load_log(lake, reader, log=log)
        schemas = sorted(latest_schemas(reader).values(), key=lambda schema: schema.name)
        tables = [
            LoadedTable(
                schema=schema,
                rows=lake.row_count(log, schema.name.short),
                done=report.tables.get(schema.name.short),
            )
            for schema in schemas
        ]
    return Loaded(
        log=log,
        position=report.position,
        from_offset=report.from_offset,
        to_offset=report.to_offset,
        version=report.version,
        took_s=report.took_s,
        tables=tables,
    )


def open_lake(config: Config, *, read_only: bool = False) -> Lake:
    """The lake of this configuration."""
    return Lake.open(
        catalog=config.lake_catalog,
        data=config.lake_data,
        s3=config.lake.s3,
        extensions=config.extension_folder,
        read_only=read_only,
    )


@contextmanager
def open_lake_if_there(config: Config) -> Iterator[Lake | None]:
    """The lake for reading; `None` where nothing was loaded yet."""
    kind, _, place = config.lake_catalog.partition(":")
    if kind == "sqlite" and not Path(place).exists():
        yield None
        return
    with open_lake(config, read_only=True) as lake:
        yield lake


def verify(config: Config, source: str, *, sample_keys: int = SAMPLE_KEYS) -> Verification:
    """Compare the source with the lake at one position, while both are in use; names so many differing keys a table.

    The log is brought to the position of the comparison first, by this process or by the service.
    """
    with opened(config, source) as database, open_lake(config) as lake:
        return compare(
            database,
            lake,
            open_reader(config, source),
            log=source,
            catch_up=lambda: capture(config, source),
            sample_keys=sample_keys,
        )


def expect(config: Config, suites: Sequence[Suite]) -> Sequence[SuiteResult]:
    """Run suites on one version of the lake."""
    with open_lake(config) as lake:
        return run_suites(lake, suites)


def release(config: Config, *, checked_version: int, evidence: Mapping[str, Any]) -> Release:
    """Publish the models and documents as they are now, if the loads are those that were checked.

    `checked_version` is the lake version that the first checks of the run saw. Models are built
    after them, so the newest version is released; but if a load came in between, nobody has checked
    what it brought.

    Raises:
        LakeMovedError: run the job again; the previous release stays.
    """
    with open_lake(config) as lake:
        version = lake.version()
        checked, current = (
            loaded_positions(lake.connection, checked_version),
            loaded_positions(lake.connection, version),
        )
        if checked != current:
            moved = ", ".join(
                f"{log} from {checked.get(log)} to {position}"
                for log, position in current.items()
                if checked.get(log) != position
            )
            raise LakeMovedError(
                f"cannot release lake version {version}: a load moved {moved} after the checks; run the job again"
            )
        return publish(lake, views=_views(config, lake), evidence=evidence, version=version)


def released(config: Config) -> Release | None:
    """The release that readers see."""
    with open_lake(config) as lake:
        return current_release(lake)


def is_released(config: Config, source: str) -> bool:
    """Whether everything that is loaded of a source is released."""
    with open_lake(config) as lake:
        release = current_release(lake)
        return release is not None and release.positions.get(source) == last_load(lake, source).position


def _views(config: Config, lake: Lake) -> Mapping[str, str]:
    """View names and the tables they show: the marts, and the documents of every app."""
    names = lake.connection.execute(
        "select schema_name, table_name from duckdb_tables() where database_name = 'lake' order by all"
    ).fetchall()
    shown = {MODELED_SCHEMA, *config.apps}
    return {table: f"{schema}.{table}" for schema, table in names if schema in shown}
