"""What an app's state says to other processes: how many keys wait, and how far the log is read. Reads, never writes."""

import json
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.position import START, Lsn
from deltaworks.process.place import own_folder
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


def read_standings(app_folder: Path, *, except_shares: Collection[int] = ()) -> Standings:
    """The state as of now, but for entities of some shares; nothing where the app never ran."""
    file = app_folder / STATE_FILE
    if not file.exists():
        return Standings()
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        chosen, in_shares, values = "", "", {"except_shares": json.dumps(list(except_shares))}
        if except_shares:
            in_shares = "in (select value from json_each(:except_shares))"
            chosen = f"and _key not in (select _key from touched where share {in_shares})"
            in_shares = f"and not ifnull(share, -1) {in_shares}"
        try:
            counts = dict(
                connection.execute(
                    f"select standing, count(*) from entity where standing <> 0 {chosen} group by standing", values
                )
            )
            (dead_turns,) = connection.execute(
                f"select count(*) from turn where is_dead {in_shares}", values
            ).fetchone()
            (waiting_since,) = connection.execute(
                f"select min(committed_at) / 1e6 from entity where standing in (1, 2) {chosen}", values
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
    """Counts the keys of one app that wait, when a scrape asks; of a shared app, those of this process's member."""

    def __init__(self, app: str, app_folder: Path, *, is_shared: bool = False) -> None:
        self._app = app
        self._folder = app_folder
        self._is_shared = is_shared

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The counts as of now."""
        found = read_standings(own_folder(self._folder, is_shared=self._is_shared))
        family = GaugeMetricFamily(
            "deltaworks_process_keys",
            "Keys by where they stand: to_do, held (to be tried again), dead; dead_turns of steps under on_change.",
            labels=["app", "standing"],
        )
        for standing in ("to_do", "held", "dead", "dead_turns"):
            family.add_metric([self._app, standing], getattr(found, standing))
        yield family
