"""How fresh each place is: nothing that was committed longer ago than that is missing there.

    source ──lag──► log ──pending──► lake
                     └───pending──► app ──pending──► lake of the app

The source is asked where its own log ends, so no row has to be written to an idle one to be timed: where the log has
all of it and a place has all of the log, the place is as fresh as the log. On a source that is written to beside the
captured tables, capture notes every ten seconds how far it has read, and that bounds the age.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.config import Config
from deltaworks.log.canary import canary_at
from deltaworks.log.change_log import LogReader, OffsetRetiredError
from deltaworks.log.registry import log_of, open_reader
from deltaworks.operate.sources import capture_status
from deltaworks.process.standing import read_standings
from deltaworks.store.load import LastLoad


def app_age_s(config: Config, app: str, *, log_age_s: float | None, now: datetime) -> float | None:
    """Of an app's documents in its sinks; a key that waits for another try is missing, a dead letter is given up."""
    standings = read_standings(config.app_folder(app))
    reader = open_reader(config, config.app(app).source)
    ages = [
        log_age_s,
        pending_age_s(reader, sequence=standings.sequence, offset=standings.offset, now=now),
        0.0 if standings.waiting_since is None else now.timestamp() - standings.waiting_since,
    ]
    return oldest(ages)


def app_canary_s(config: Config, app: str, *, now: datetime) -> float | None:
    """How long ago the newest canary was written that an app's sinks were told of; `None` where none is known.

    While all is idle it stays below the interval of the canaries, and it grows where anything on the way stands.
    """
    standings = read_standings(config.app_folder(app))
    reader = log_of(config, config.app(app).source).near_reader()
    canary = canary_at(reader, sequence=standings.sequence, reached=standings.reached)
    return None if canary is None else canary.age_s(now)


def lake_age_s(reader: LogReader, loaded: LastLoad, *, log_age_s: float | None, now: datetime) -> float | None:
    """Of a log's tables in the lake."""
    return oldest([log_age_s, pending_age_s(reader, sequence=loaded.sequence, offset=loaded.next_offset, now=now)])


def pending_age_s(reader: LogReader, *, sequence: int, offset: int, now: datetime) -> float | None:
    """How long ago the first change was committed that the log has beyond a place; 0 where there is none.

    Not known where the log does not keep it any more.
    """
    if reader.end().offset <= offset:
        return 0.0
    with suppress(OffsetRetiredError):
        for group in reader.read(after_sequence=sequence):
            commits = [pc.min(batch.rows.column("_committed_at")).as_py() for batch in group.batches if len(batch)]
            if commits:
                first: datetime = min(commits)
                return max(0.0, (now - first).total_seconds())
        return 0.0
    return None


def oldest(ages_s: list[float | None]) -> float | None:
    """The largest; not known where one of them is not."""
    known = [age for age in ages_s if age is not None]
    return max(known) if len(known) == len(ages_s) else None


class AgeCollector(Collector):
    """Tells how fresh an app is when a scrape asks, which asks the source one short question."""

    def __init__(self, config: Config, app: str) -> None:
        self._config = config
        self._app = app

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One number; no sample while the source does not answer."""
        family = age_metric()
        status = capture_status(self._config, self._config.app(self._app).source)
        age_s = app_age_s(self._config, self._app, log_age_s=status.lag_s, now=datetime.now(UTC))
        if age_s is not None:
            family.add_metric([self._app], age_s)
        yield family
        family, canary_s = canary_metric(), app_canary_s(self._config, self._app, now=datetime.now(UTC))
        if canary_s is not None:
            family.add_metric([self._app], canary_s)
        yield family

    def describe(self) -> list[GaugeMetricFamily]:
        """Without asking."""
        return [age_metric(), canary_metric()]


def canary_metric() -> GaugeMetricFamily:
    """The other metric without a sample."""
    return GaugeMetricFamily(
        "deltaworks_process_canary_age_seconds",
        "How long ago the newest canary was written that the app's sinks were told of; it grows while nothing comes.",
        labels=["app"],
    )


def age_metric() -> GaugeMetricFamily:
    """The metric without a sample."""
    return GaugeMetricFamily(
        "deltaworks_process_age_seconds",
        "Nothing that was committed longer ago than this is missing in the app's sinks, dead letters aside.",
        labels=["app"],
    )
