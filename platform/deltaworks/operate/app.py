"""Apps: bring one to the end of the log, or be the service that keeps it there."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaworks.config import Config
from deltaworks.log.registry import open_reader
from deltaworks.operate.lease import leased, taken_unless_done, warm_up
from deltaworks.operate.log import OnProgress
from deltaworks.position import Lsn
from deltaworks.process.checkpoint import read_reached
from deltaworks.process.lineage import LINEAGE_FILE, Columns
from deltaworks.process.lineage import read as read_lineage
from deltaworks.process.live import publishing
from deltaworks.process.pausing import Pause
from deltaworks.process.place import AppHeldError
from deltaworks.process.registry import load_app
from deltaworks.process.room import StateFullError
from deltaworks.process.runner import STATE_FILE, Runner
from deltaworks.store.lake_table import LakeTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Processed:
    """An app after a `process`. `held` and `dead` are entities that wait now."""

    app: str
    processed_by: str
    position: Lsn
    counts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for people."""
        said = ", ".join(f"{value:,} {name}" for name, value in self.counts.items() if isinstance(value, int))
        return f"{self.app}: processed by {self.processed_by} up to {self.position}: {said}"


def process(config: Config, app: str, *, on_progress: OnProgress | None = None) -> Processed:
    """Bring an app to the end of its source's log, by a drain here or by waiting for the service.

    Raises:
        ServiceSlowError: the service did not get there in `SERVICE_PATIENCE_S`.
        AppPausedError: a person paused the app.
        DeltaworksError: whatever the app's run raises.
    """
    target = open_reader(config, config.app(app).source).end()
    loaded, pause, state = load_app(config, app), Pause(config.app_folder(app)), config.app_folder(app) / STATE_FILE

    def is_done() -> bool:
        pause.check(app)
        return read_reached(state) >= target.position

    runner = taken_unless_done(
        lambda: Runner.open(loaded, config=config, name=app),
        AppHeldError,
        is_done=is_done,
        what=f"the process service of {app!r}",
    )
    if runner is None:
        return Processed(app=app, processed_by="the process service", position=read_reached(state))
    with runner:
        report = runner.drain(on_progress=work_progress(app, on_progress))
    return Processed(
        app=app,
        processed_by="this run",
        position=report.position,
        counts={
            "changes": report.changes,
            "documents": report.documents,
            "removed": report.removed,
            "enriched": report.enriched,
            "retried": report.retried,
            "held": report.held,
            "dead": report.dead,
        },
    )


def follow_process(config: Config, app: str, *, stop: threading.Event) -> None:
    """Be the process service of an app: wait for the lease, and for room on disk, then follow the log until `stop`."""
    loaded = load_app(config, app)
    warm_up()
    with leased(
        lambda: Runner.open(loaded, config=config, name=app), (AppHeldError, StateFullError), stop=stop
    ) as runner:
        if runner is not None:
            with publishing(loaded, name=app, folder=runner.folder):
                runner.end_when_stuck()
                runner.follow(stop)


def pause(config: Config, app: str) -> None:
    """Let an app stand still until `resume`, over restarts too; a running service does so within a moment."""
    config.app(app)
    Pause(config.app_folder(app)).pause()


def resume(config: Config, app: str) -> None:
    """Let a paused app go on."""
    config.app(app)
    Pause(config.app_folder(app)).resume()


def tables_read_by(config: Config, app: str) -> Sequence[str]:
    """Short names of the source's tables that the app reads or looks up, in its order."""
    loaded = load_app(config, app)
    return list(dict.fromkeys(table.name.short for table in [*loaded.tables, *loaded.lookups]))


def lake_tables_of(config: Config, app: str) -> Sequence[str]:
    """The lake tables that the app's documents come to."""
    return [sink.name for sink in load_app(config, app).sinks if isinstance(sink, LakeTable)]


def document_lineage(config: Config, app: str) -> Mapping[str, Columns]:
    """Which source columns each field of the app's documents was seen to depend on."""
    return read_lineage(config.app_folder(app) / LINEAGE_FILE)


def work_progress(app: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    """What a run tells of its work, under the app's name."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(f"{app}: changes and documents", done, total)
