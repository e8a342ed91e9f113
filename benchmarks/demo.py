"""The main job's own figures: `make demo` from an empty folder and again, in turn, each beside its limit.

The load job stands beside the bare work in the same folder: every table by plain COPY into a local DuckDB, then
`dbt build` by its command line. It leaves out the log, the documents, the comparison with the source, the
expectations and the release. The lag stands beside that of a watcher that asks the database itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
from measure import Figure, arguments, report

from deltaworks.config import Config
from resources import environment
from studio import database
from studio.demo import SOURCE
from studio.services import Services

ROOT = Path(__file__).resolve().parent.parent


def run_demo(home: Path) -> dict[str, Any]:
    """One demo in a folder of its own; its figures, and how long it took with all that it starts and stops."""
    figures = home / "figures.json"
    config = home / "deltaworks.yaml"
    if not config.exists():
        config.write_text((ROOT / "deltaworks.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "studio.demo", "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "DELTAWORKS_CONFIG": str(config)},
        check=True,
    )
    return {**json.loads(figures.read_text(encoding="utf-8")), "took_s": time.monotonic() - began}


def run_bare(home: Path) -> float:
    """The bare work on the database that a demo left in its folder; seconds, without the database's start."""
    config = environment.config(home / "deltaworks.yaml")
    dsn = config.source(SOURCE).dsn.get_secret_value()
    with Services(home / "logs", environment={}) as services:
        command = [sys.executable, "-m", "studio.database", "run", "--folder", str(config.home / "postgres")]
        services.start("database", command)
        services.wait("database", until=lambda: _answers(dsn), timeout_s=60)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            copy_tables(config, dsn, Path(folder))
            build_models(config, Path(folder))
        return time.monotonic() - began


def copy_tables(config: Config, dsn: str, folder: Path) -> None:
    """Every table, once, into a DuckDB file."""
    tables = [table.short for table in config.source(SOURCE).table_names]
    with database.connect(dsn) as connection, duckdb.connect(str(folder / "bare.duckdb")) as bare:
        for table in tables:
            file = folder / f"{table}.csv"
            with (
                file.open("wb") as out,
                connection.cursor().copy(f"copy {table} to stdout (format csv, header)") as rows,
            ):
                for block in rows:
                    out.write(block)
            bare.execute(f"create table {table} as from read_csv('{file}')")


def build_models(config: Config, folder: Path) -> None:
    """The same models and tests, by dbt's command line."""
    environment.export_lake(config)
    project = str(ROOT / "dbt_project")
    command = [str(Path(sys.executable).with_name("dbt")), "--quiet", "build", "--target-path", str(folder / "target")]
    subprocess.run([*command, "--project-dir", project, "--profiles-dir", project], check=True, cwd=folder)


def _answers(dsn: str) -> bool:
    try:
        return database.is_loaded(dsn)
    except database.DatabaseNotReachableError:
        return False


def main() -> int:
    """Repeat first run, bare work and second run in turn."""
    options = arguments(__doc__ or "")
    first, bare, second = [], [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="deltaworks-") as folder:
            Path(folder).chmod(0o755)
            first.append(run_demo(Path(folder)))
            bare.append(run_bare(Path(folder)))
            second.append(run_demo(Path(folder)))
    runs = first + second
    jobs = [run["job_s"] for run in first]
    figures = [
        Figure(name="first run, without the install", values=[run["took_s"] for run in first], unit="s", goal=300),
        Figure(name="second run", values=[run["took_s"] for run in second], unit="s", goal=120),
        Figure(name="load job of the first run", values=jobs, unit="s"),
        Figure(name="bare COPY, DuckDB and dbt", values=bare, unit="s"),
        Figure(
            name="load job / bare work", values=[job / least for job, least in zip(jobs, bare, strict=True)], unit="×"
        ),
        Figure(name="commit → searchable, p50", values=[run["lag_p50_s"] for run in runs], unit="s", goal=1),
        Figure(name="commit → searchable, p99", values=[run["lag_p99_s"] for run in runs], unit="s", goal=3),
        Figure(name="commit → seen in the database, p50", values=[run["least_lag_p50_s"] for run in runs], unit="s"),
        Figure(
            name="searchable / seen in the database, p50",
            values=[run["lag_p50_s"] / run["least_lag_p50_s"] for run in runs],
            unit="×",
        ),
        Figure(
            name="updates applied",
            values=[run["changes_per_s"] for run in runs],
            unit="changes/s",
            goal=490,
            smaller_is_better=False,
        ),
    ]
    return report("The main job", figures, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
