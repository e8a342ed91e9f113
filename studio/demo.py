"""`make demo`: the main job once, with real films, and a report of what was measured.

    database ─► Talent Service ─► the load job in Dagster ─► services ─► 20 s of updates ─► report

Everything it starts, it stops; a second run goes on from where the first one ended.
"""

import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from dagster import DagsterRunStatus
from dagster._core.definitions.repository_definition import SINGLETON_REPOSITORY_NAME
from dagster_graphql import DagsterGraphQLClient
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, TerminalError
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE
from deltaworks.log.registry import holder, open_reader
from resources import environment
from studio import database
from studio.ready import CODE_PORT, DAGSTER_PORT, is_taken, ports, prepare_dagster, refuse_taken
from studio.services import ServiceFailedError, Services, answers
from studio.updates import Commit, UpdateReport, apply_updates
from studio.watcher import VotesWatcher, database_look, search_look

SOURCE, APP = "studio", "movie_search"
JOB = f"load_{SOURCE}"
DAGSTER_PAGE = f"http://127.0.0.1:{DAGSTER_PORT}"
SEARCHES = ("casablanca", "kubrick", "star wars")
BIN = Path(sys.executable).parent
CODE = ("-m", "assets.definitions", "-h", "127.0.0.1", "-p", str(CODE_PORT), "--location-name", "deltaworks")
FINISHED = (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED)

out = Console()


class DemoRunningError(TerminalError):
    """Another demo has this folder."""


@dataclass(slots=True)
class Figures:
    """What the demo measured; `report` prints it and `--json` writes it."""

    started_at: float = field(default_factory=time.monotonic)
    job_s: float = 0.0
    captured: int = 0
    documents: int = 0
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    updates: UpdateReport | None = None
    lags_s: list[float] = field(default_factory=list)
    least_lags_s: list[float] = field(default_factory=list)
    unseen: int = 0
    is_equal: bool = False
    position: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    release: str = ""
    searches: dict[str, list[str]] = field(default_factory=dict)


def main(
    rate: Annotated[int, typer.Option(help="Row changes per second.")] = 500,
    seconds: Annotated[float, typer.Option(help="How long the updates last.")] = 20.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
) -> None:
    """Run the demo; exits 0 when source = lake and every check passed."""
    figures = Figures()
    # Stopped from outside, it stops what it started, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = environment.config()
        with _only_one(config), Services(config.home / "logs", environment=_child_environment()) as services:
            _run(config, services, figures, rate=rate, seconds=seconds)
    except DeltaworksError as error:
        out.print(f"demo: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    _report(config, figures)
    if json_path is not None:
        json_path.write_text(json.dumps(_as_json(figures), indent=1), encoding="utf-8")
    if not figures.is_equal or figures.unseen or not all(figures.checks.values()):
        raise typer.Exit(1)


def _run(config: Config, services: Services, figures: Figures, *, rate: int, seconds: float) -> None:
    refuse_taken(ports(config))
    dsn = config.source(SOURCE).dsn.get_secret_value()
    talent = str(config.app(APP).settings["talent_url"])
    page = f"http://{config.serve.host}:{config.serve.port}"
    with _doing("PostgreSQL 18 with the studio's films"):
        services.start(
            "database", [sys.executable, "-m", "studio.database", "run", "--folder", str(config.home / "postgres")]
        )
        services.start("talent", [sys.executable, "-m", "studio.talent"])
        # While the database starts; whatever else of Dagster's starts needs it.
        prepare_dagster()
        services.start("runs", _dagster("python", "-m", "resources.run_worker", workspace=False))
        services.start("code", _dagster("dagster", "api", "grpc", *CODE, workspace=False))
        services.wait("database", until=lambda: _is_loaded(dsn), timeout_s=120)
        services.wait("talent", until=answers(f"{talent}/health"), timeout_s=30)
    with _doing("Dagster"):
        services.wait("code", until=lambda: is_taken(CODE_PORT), timeout_s=90)
        services.start("webserver", _dagster("dagster-webserver", "--host", "127.0.0.1", "--port", str(DAGSTER_PORT)))
        services.wait("webserver", until=answers(f"{DAGSTER_PAGE}/server_info"), timeout_s=90)
        services.wait("runs", until=lambda: "runs start" in services.output("runs").read_text(), timeout_s=90)
    began = time.monotonic()
    figures.captured = _run_job(config, services, sum(database.row_counts(dsn).values()))
    figures.job_s = time.monotonic() - began
    with _doing("services: capture, process, serve"):
        app_lock = config.app_folder(APP) / LOCK_FILE
        services.wait("capture", until=lambda: holder(config, SOURCE) is not None, timeout_s=60)
        services.wait("process", until=lambda: holder_of(app_lock) is not None, timeout_s=60)
        services.wait("serve", until=answers(f"{page}/health"), timeout_s=60)
    _stream(dsn, page, figures, rate=rate, seconds=seconds)
    with _doing("the sensor's load brings the lake to the end of the log"):
        services.wait("daemon", until=lambda: not operate.behind(config, SOURCE).is_behind, timeout_s=180)
        _wait_for_release(config, services)
    with _doing("source = lake, row by row, at one position"):
        verification = operate.verify(config, SOURCE)
    figures.is_equal, figures.position = verification.is_equal, str(verification.position)
    figures.rows = {
        verdict.table: {"source": verdict.source_rows, "lake": verdict.lake_rows} for verdict in verification.tables
    }
    release = operate.released(config)
    if release is None:
        raise TerminalError(f"nothing is released; what the job did is in {str(services.output('runs'))!r}")
    figures.release = f"{release.id}, lake version {release.version}, {len(release.views)} views in prod"
    figures.checks = release.evidence["checks"]
    figures.documents = httpx.get(f"{page}/api/status", timeout=5.0).json()["document_count"]
    for query in SEARCHES:
        figures.searches[query] = _search(page, query)


def _run_job(config: Config, services: Services, expected_rows: int) -> int:
    """The load job as Dagster runs it, launched as its page would, with its progress; the changes it captured."""
    dagster = DagsterGraphQLClient("127.0.0.1", port_number=DAGSTER_PORT)
    run_id = dagster.submit_job_execution(
        JOB, repository_location_name="deltaworks", repository_name=SINGLETON_REPOSITORY_NAME
    )
    # It takes the run from the queue; its sensor asks for no load while one is queued or runs.
    services.start("daemon", _dagster("dagster-daemon", "run"))
    reader = open_reader(config, SOURCE)
    already = reader.end().offset
    follow = False
    with Progress(
        TextColumn("  {task.description:42}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=out,
    ) as bars:
        captured = bars.add_task("rows captured", total=expected_rows if not already else None, note="")
        steps = bars.add_task("steps of the load job", total=None, note="")
        while (status := dagster.get_run_status(run_id)) not in FINISHED:
            offset = reader.end().offset - already
            bars.update(captured, completed=offset, note=f"{offset:,}")
            done, running = _steps(services.output("runs"))
            bars.update(steps, completed=len(done), note=running)
            if not follow and f"enriched_{APP}" in done:
                # The job has captured and processed; the services that go on with it start beside its other steps.
                follow = True
                _start_streams(services)
            services.refuse_ended()
            time.sleep(0.3)
        bars.update(captured, total=1, completed=1)
        bars.update(steps, total=1, completed=1, note=status.value.lower())
    if status != DagsterRunStatus.SUCCESS:
        raise ServiceFailedError(f"the load job ended as {status.value}:\n{services.tail('runs')}")
    if not follow:
        _start_streams(services)
    return reader.end().offset - already


def _start_streams(services: Services) -> None:
    services.start("capture", [str(BIN / "deltaworks"), "capture", SOURCE])
    services.start("process", [str(BIN / "deltaworks"), "process", APP])
    services.start("serve", [str(BIN / "deltaworks"), "serve"])


def _stream(dsn: str, page: str, figures: Figures, *, rate: int, seconds: float) -> None:
    """Apply updates, and watch when each is searchable and when the database itself shows it."""
    with (
        search_look(page) as in_search,
        database_look(dsn) as in_database,
        VotesWatcher(in_search, name="search-watcher") as searchable,
        VotesWatcher(in_database, name="database-watcher") as committed,
        Progress(
            TextColumn("  {task.description:42}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=out,
        ) as bars,
    ):
        bar = bars.add_task(f"real updates, {rate} changes/s", total=rate * seconds, note="")

        def on_commit(commit: Commit) -> None:
            searchable.expect(commit)
            committed.expect(commit)
            bars.update(bar, advance=commit.changes, note=f"{len(searchable.lags_s):,} seen by search")

        figures.updates = apply_updates(dsn, rate=rate, seconds=seconds, on_commit=on_commit)
        # Films that are drafts or withdrawn by now are not listed, so nothing can show their votes.
        searchable.forget(_unlisted(dsn))
        searchable.wait(timeout_s=30.0)
    figures.lags_s, figures.unseen = searchable.lags_s, searchable.unseen
    figures.least_lags_s = committed.lags_s


def _unlisted(dsn: str) -> set[int]:
    with database.connect(dsn) as connection:
        rows = connection.execute("select movie_id from movie where status in ('draft', 'withdrawn')").fetchall()
    return {movie_id for (movie_id,) in rows}


def _is_loaded(dsn: str) -> bool:
    try:
        return database.is_loaded(dsn)
    except DeltaworksError:
        return False


def _dagster(*command: str, workspace: bool = True) -> list[str]:
    """A command that leaves the processor to the streams and to the job when they want it, as in the Procfile."""
    places = ["--workspace", str(environment.ROOT / "workspace.services.yaml")] if workspace else []
    return ["nice", "-n", "10", str(BIN / command[0]), *command[1:], *places]


def _child_environment() -> dict[str, str]:
    # Dagster's own state lies where dagster.yaml says, seen from this folder.
    return {"DAGSTER_HOME": str(environment.ROOT), "PYTHONUNBUFFERED": "1"}


def _steps(output: Path) -> tuple[set[str], str]:
    """Steps of the job that are done, and the one that runs, from what Dagster printed."""
    text = output.read_text(errors="replace")
    started = re.findall(r"- (\w+) - STEP_START", text)
    return set(re.findall(r"- (\w+) - STEP_SUCCESS", text)), started[-1] if started else "Dagster starts it"


def _wait_for_release(config: Config, services: Services) -> None:
    """Until what the lake holds is what `prod` shows."""
    services.wait("daemon", until=lambda: operate.is_released(config, SOURCE), timeout_s=180)


def _search(page: str, query: str) -> list[str]:
    hits = httpx.get(f"{page}/api/search", params={"q": query, "limit": 3}, timeout=5.0).json()["hits"]
    return [f"{hit['body']['title']} ({hit['body']['year']})" for hit in hits]


@contextmanager
def _only_one(config: Config) -> Iterator[None]:
    config.home.mkdir(parents=True, exist_ok=True)
    with (config.home / "demo.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise DemoRunningError(
                f"a demo is running in {str(config.home)!r} as process {lock.read().strip() or 'unknown'}; "
                "wait for it to end, or stop it with Ctrl-C in its terminal"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """A spinner with the time taken, left behind as a line."""
    began = time.monotonic()
    with Progress(
        TextColumn("  {task.description:42}"), BarColumn(), TimeElapsedColumn(), console=out, transient=True
    ) as bars:
        bars.add_task(what, total=None)
        yield
    out.print(f"  {what:42} [green]✓[/] {time.monotonic() - began:.1f} s", highlight=False)


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _report(config: Config, figures: Figures) -> None:
    """Print what was measured, and where to look."""
    rows = Table("table", "source", "lake", title="rows, source and lake at one position", title_justify="left")
    for name, counts in figures.rows.items():
        rows.add_row(name, f"{counts['source']:,}", f"{counts['lake']:,}")
    out.print(rows)
    passed = sum(figures.checks.values())
    updates = figures.updates
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "changes captured by the load job", f"{figures.captured:,} in {figures.job_s:.0f} s for the whole job"
    )
    facts.add_row("documents searchable", f"{figures.documents:,}")
    if updates is not None:
        facts.add_row(
            "live updates",
            f"{updates.change_count:,} changes in {updates.transaction_count:,} commits, {updates.changes_per_s:.0f}/s",
        )
    facts.add_row(
        "commit → searchable",
        f"p50 {_percentile(figures.lags_s, 0.5) * 1000:.0f} ms, p99 {_percentile(figures.lags_s, 0.99) * 1000:.0f} ms "
        f"over {len(figures.lags_s):,} updates" + (f", [red]{figures.unseen} never seen[/]" if figures.unseen else ""),
    )
    facts.add_row(
        "source = lake",
        f"[green]yes[/], at {figures.position}" if figures.is_equal else f"[red]NO[/], at {figures.position}",
    )
    facts.add_row("checks passed", f"{passed} of {len(figures.checks)}")
    facts.add_row("release", figures.release)
    for query, titles in figures.searches.items():
        facts.add_row(f"search “{query}”", ", ".join(titles) or "nothing found")
    facts.add_row("whole demo", f"{time.monotonic() - figures.started_at:.0f} s")
    out.print(facts, highlight=False)
    page = f"http://{config.serve.host}:{config.serve.port}"
    out.print(f"\nEverything is stopped again. `make up` starts it: search at {page}, Dagster at {DAGSTER_PAGE}")


def _as_json(figures: Figures) -> dict[str, Any]:
    return {
        "job_s": figures.job_s,
        "rows": figures.rows,
        "changes_per_s": figures.updates.changes_per_s if figures.updates else 0.0,
        "lag_p50_s": _percentile(figures.lags_s, 0.5),
        "lag_p99_s": _percentile(figures.lags_s, 0.99),
        "lag_count": len(figures.lags_s),
        "least_lag_p50_s": _percentile(figures.least_lags_s, 0.5),
        "least_lag_p99_s": _percentile(figures.least_lags_s, 0.99),
        "unseen": figures.unseen,
        "is_equal": figures.is_equal,
        "checks": figures.checks,
        "release": figures.release,
        "took_s": time.monotonic() - figures.started_at,
    }


if __name__ == "__main__":
    typer.run(main)
