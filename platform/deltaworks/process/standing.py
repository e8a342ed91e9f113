"""What an app's state says to other processes: how many keys wait, and how far the log is read. Reads, never writes."""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.position import START, Lsn
from deltaworks.process.runner import STATE_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Standings:
    """An app's state at one moment. `offset` counts the changes that are folded, group `sequence` is the last of
    them, `reached` is where the sinks are.

    `to_do` entities are due, `held` ones wait for another try, `dead` ones failed for good; `dead_turns` are changes
    that a step under `on_change` failed to take. `waiting_since` is when the oldest change of an entity that
    is to do or held was committed, in seconds since 1970.
    """

    to_do: int = 0
    held: int = 0
    dead: int = 0
    dead_turns: int = 0
    sequence: int = -1
    offset: int = 0
    reached: Lsn = START
    waiting_since: float | None = None


def read_standings(app_folder: Path) -> Standings:
    """The state as of now; nothing where the app never ran."""
    file = app_folder / STATE_FILE
    if not file.exists():
        return Standings()
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            counts = dict(
                connection.execute("select standing, count(*) from entity where standing <> 0 group by standing")
            )
            (dead_turns,) = connection.execute("select count(*) from turn where is_dead").fetchone()
            (waiting_since,) = connection.execute(
                "select min(committed_at) / 1e6 from entity where standing in (1, 2)"
            ).fetchone()
            row = connection.execute("select sequence, offset, reached from checkpoint").fetchone()
        except sqlite3.OperationalError:
            # The runner is creating the file at this moment.
            return Standings()
    sequence, offset, reached = row or (-1, 0, 0)
    return Standings(
        to_do=counts.get(1, 0),
        held=counts.get(2, 0),
        dead=counts.get(3, 0),
        dead_turns=dead_turns,
        sequence=sequence,
        offset=offset,
        reached=Lsn(reached),
        waiting_since=waiting_since,
    )


def waiting_keys(app_folder: Path) -> list[Any]:  # Any: a key is what the app's key column holds
    """The keys that wait for another try, or failed for good."""
    file = app_folder / STATE_FILE
    if not file.exists():
        return []
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        return [key for (key,) in connection.execute("select _key from entity where standing in (2, 3)")]


class StandingCollector(Collector):
    """Counts the keys of one app that wait, when a scrape asks."""

    def __init__(self, app: str, app_folder: Path) -> None:
        self._app = app
        self._folder = app_folder

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The counts as of now."""
        found = read_standings(self._folder)
        family = GaugeMetricFamily(
            "deltaworks_process_keys",
            "Keys by where they stand: to_do, held (to be tried again), dead; dead_turns of steps under on_change.",
            labels=["app", "standing"],
        )
        for standing in ("to_do", "held", "dead", "dead_turns"):
            family.add_metric([self._app, standing], getattr(found, standing))
        yield family
