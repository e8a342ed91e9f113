"""`make demo`: the main job once, with real films, and a report of what was measured.

    database ─► Talent Service ─► the load job in Dagster ─► services ─► 20 s of updates ─► report

Everything it starts, it stops; a second run goes on from where the first one ended.
"""

import fcntl
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, TerminalError
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE, LocalLogReader
from resources import environment
from studio import database
from studio.ready import CODE_PORT, DAGSTER_PORT, ports, prepare_dagster, refuse_taken
from studio.services import Services, answers
from studio.updates import Commit, UpdateReport, apply_updates

SOURCE, APP = "studio", "movie_search"
JOB = f"load_{SOURCE}"
DAGSTER_PAGE = f"http://127.0.0.1:{DAGSTER_PORT}"
SEARCHES = ("casablanca", "kubrick", "star wars")
BIN = Path(sys.executable).parent

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
        services.wait("database", until=lambda: _is_loaded(dsn), timeout_s=120)
        services.start("talent", [sys.executable, "-m", "studio.talent"])
        services.wait("talent", until=answers(f"{talent}/health"), timeout_s=30)
    with _doing("Dagster's storage and the dbt project"):
        prepare_dagster()
    # The pages of Dagster and of the search load while the job runs; nothing of them takes part in it.
    code = ["dagster", "api", "grpc", "-m", "assets.definitions", "-h", "127.0.0.1", "-p", str(CODE_PORT)]
    services.start("code", _dagster(*code, "--location-name", "deltaworks", workspace=False))
    services.start("webserver", _dagster("dagster-webserver", "--host", "127.0.0.1", "--port", str(DAGSTER_PORT)))
    services.start("serve", [str(BIN / "deltaworks"), "serve"])
    began = time.monotonic()
    figures.captured = _run_job(config, services, sum(database.row_counts(dsn).values()))
    figures.job_s = time.monotonic() - began
    with _doing("services: capture, process, serve, Dagster"):
        services.start("capture", [str(BIN / "deltaworks"), "capture", SOURCE])
        services.start("process", [str(BIN / "deltaworks"), "process", APP])
        services.start("daemon", _dagster("dagster-daemon", "run"))
        for name, lock in (("capture", config.log_folder(SOURCE)), ("process", config.app_folder(APP))):
            services.wait(name, until=lambda lock=lock: holder_of(lock / LOCK_FILE) is not None, timeout_s=60)  # type: ignore[misc]
        services.wait("daemon", until=lambda: "daemons:" in services.output("daemon").read_text(), timeout_s=90)
        services.wait("serve", until=answers(f"{page}/health"), timeout_s=60)
        services.wait("webserver", until=answers(f"{DAGSTER_PAGE}/server_info"), timeout_s=90)
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
        raise TerminalError(f"nothing is released; what the job did is in {str(services.output('job'))!r}")
    figures.release = f"{release.id}, lake version {release.version}, {len(release.views)} views in prod"
    figures.checks = release.evidence["checks"]
    figures.documents = httpx.get(f"{page}/api/status", timeout=5.0).json()["document_count"]
    for query in SEARCHES:
        figures.searches[query] = _search(page, query)


def _run_job(config: Config, services: Services, expected_rows: int) -> int:
    """The load job as Dagster runs it, with its progress; the changes it captured."""
    services.start("job", _dagster("dagster", "job", "execute", "-m", "assets.definitions", "-j", JOB, workspace=False))
    reader = LocalLogReader(config.log_folder(SOURCE))
    already = reader.end().offset
    with Progress(
        TextColumn("  {task.description:42}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=out,
    ) as bars:
        captured = bars.add_task("rows captured", total=expected_rows if not already else None, note="")
        steps = bars.add_task("steps of the load job", total=None, note="")
        while not services.finished("job"):
            offset = reader.end().offset - already
            bars.update(captured, completed=offset, note=f"{offset:,}")
            done, running = _steps(services.output("job"))
            bars.update(steps, completed=done, note=running)
            time.sleep(0.2)
        bars.update(captured, total=1, completed=1)
        bars.update(steps, total=1, completed=1, note="released")
    services.stop("job")
    return reader.end().offset - already


def _stream(dsn: str, page: str, figures: Figures, *, rate: int, seconds: float) -> None:
    """Apply updates and watch, over HTTP, when each is searchable."""
    watcher = SearchWatcher(page)
    with (
        watcher,
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
            watcher.expect(commit)
            bars.update(bar, advance=commit.changes, note=f"{len(watcher.lags_s):,} seen by search")

        figures.updates = apply_updates(dsn, rate=rate, seconds=seconds, on_commit=on_commit)
        watcher.wait(timeout_s=30.0)
    # Films that are drafts or withdrawn by now are not listed, so nothing can show their votes.
    watcher.forget(_unlisted(dsn))
    figures.lags_s, figures.unseen = watcher.lags_s, watcher.unseen


class SearchWatcher:
    """Asks the search page's API, over HTTP, for films that were just rated, until it shows the new votes.

    A lag is from the moment the database confirmed the commit to the answer that shows it, so it
    includes everything a user of the page would wait for, and up to one polling interval more.
    """

    POLL_S = 0.1
    KEYS_PER_REQUEST = 200

    def __init__(self, page: str) -> None:
        self.lags_s: list[float] = []
        self._page = page
        self._waiting: dict[int, list[tuple[int, float]]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="search-watcher")

    def __enter__(self) -> "SearchWatcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def unseen(self) -> int:
        """Expected votes that no answer has shown."""
        with self._lock:
            return sum(len(expected) for expected in self._waiting.values())

    def expect(self, commit: Commit) -> None:
        """Remember what the commit makes the page show; films it deletes are no longer expected."""
        now = time.monotonic()
        with self._lock:
            for movie_id in commit.deleted:
                self._waiting.pop(movie_id, None)
            for movie_id, votes in commit.votes.items():
                self._waiting.setdefault(movie_id, []).append((votes, now))

    def forget(self, movie_ids: set[int]) -> None:
        """Stop expecting films that search does not list."""
        with self._lock:
            for movie_id in movie_ids & self._waiting.keys():
                del self._waiting[movie_id]

    def wait(self, *, timeout_s: float) -> None:
        """Return when everything expected was seen, or time is up."""
        deadline = time.monotonic() + timeout_s
        while self.unseen and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(self.POLL_S)

    def _watch(self) -> None:
        with httpx.Client(base_url=self._page, timeout=5.0) as client:
            while not self._stop.wait(self.POLL_S):
                with self._lock:
                    keys = list(self._waiting)
                for first in range(0, len(keys), self.KEYS_PER_REQUEST):
                    part = keys[first : first + self.KEYS_PER_REQUEST]
                    answer = client.get("/api/documents", params=[("key", str(key)) for key in part])
                    self._see(answer.raise_for_status().json()["documents"], time.monotonic())

    def _see(self, documents: list[dict[str, Any]], now: float) -> None:
        with self._lock:
            for document in documents:
                movie_id = int(document["body"]["movie_id"])
                votes = (document["body"].get("rating") or {}).get("votes") or 0
                expected = self._waiting.get(movie_id, [])
                self.lags_s += [now - at for wanted, at in expected if wanted <= votes]
                left = [(wanted, at) for wanted, at in expected if wanted > votes]
                if left:
                    self._waiting[movie_id] = left
                else:
                    self._waiting.pop(movie_id, None)


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
    """A Dagster command that leaves the processor to the streams when they want it, as in the Procfile."""
    places = ["--workspace", str(environment.ROOT / "workspace.services.yaml")] if workspace else []
    return ["nice", "-n", "10", str(BIN / command[0]), *command[1:], *places]


def _child_environment() -> dict[str, str]:
    # Dagster's own state lies where dagster.yaml says, seen from this folder.
    return {"DAGSTER_HOME": str(environment.ROOT), "PYTHONUNBUFFERED": "1"}


def _steps(output: Path) -> tuple[int, str]:
    """Steps of the job that are done, and the one that runs, from what Dagster printed."""
    text = output.read_text(errors="replace")
    started = re.findall(r"- (\w+) - STEP_START", text)
    return len(re.findall(r" - STEP_SUCCESS", text)), started[-1] if started else "Dagster starts"


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
        "unseen": figures.unseen,
        "is_equal": figures.is_equal,
        "checks": figures.checks,
        "release": figures.release,
        "took_s": time.monotonic() - figures.started_at,
    }


if __name__ == "__main__":
    typer.run(main)
