"""How fresh each place is: nothing that was committed longer ago than that is missing there.

    source ──lag──► log ──pending──► lake
                     └───pending──► app ──pending──► lake of the app

The source is asked where its own log ends, so no row has to be written to an idle one to be timed: where the log has
all of it and a place has all of the log, the place is as fresh as the log. On a source that is written to beside the
captured tables, capture notes every ten seconds how far it has read, and that bounds the age.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypedDict

import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.config import Config
from deltaworks.log.canary import canary_at
from deltaworks.log.change_log import LogReader, OffsetRetiredError
from deltaworks.log.registry import LogPlace, log_of
from deltaworks.operate.sources import capture_status
from deltaworks.position import START, Lsn
from deltaworks.process.shared.member import MemberStanding
from deltaworks.process.shared.members import read_members
from deltaworks.process.standing import Standings, read_standings
from deltaworks.store.load import LastLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """How fresh documents of an app are in its sinks, which were told of `reached`; `None`: not known.

    A key that waits for another try is missing, a dead letter is given up. `canary_s` is how long ago the newest canary
    was written that the sinks were told of. While all is idle it stays below the interval of the canaries, and it grows
    where anything on the way stands.
    """

    reached: Lsn
    age_s: float | None
    canary_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFreshness(Freshness):
    """Of the entities of some shares, as who had them last says: `name` is its machine and process.

    `text` says what became of it where others have its shares now, or nobody. `said` is what it said last.
    """

    name: str
    shares: tuple[int, ...]
    text: str
    said: MemberStanding | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AppFreshness(Freshness):
    """Of a whole app: that of its oldest member, on whatever machine, where several processes share it."""

    members: tuple[MemberFreshness, ...] = ()


def app_freshness(config: Config, app: str, *, log_age_s: float | None, now: datetime) -> AppFreshness:
    """How fresh an app is now, on a source whose log is as old as that."""
    settings = config.app(app)
    log = log_of(config, settings.source)
    fresh = partial(_freshness, log, log_age_s=log_age_s, now=now)
    if settings.shares is None:
        return AppFreshness(**fresh(read_standings(config.app_folder(app))))
    members = tuple(
        MemberFreshness(
            name=member.name, shares=member.shares, text=member.text, said=member.said, **fresh(member.said)
        )
        for member in read_members(config, app)
        if member.shares
    )
    return AppFreshness(
        reached=min((member.reached for member in members), default=START),
        age_s=oldest([member.age_s for member in members]) if members else None,
        canary_s=oldest([member.canary_s for member in members]) if members else None,
        members=members,
    )


class _Fresh(TypedDict):
    reached: Lsn
    age_s: float | None
    canary_s: float | None


def _freshness(
    log: LogPlace, standing: Standings | MemberStanding | None, *, log_age_s: float | None, now: datetime
) -> _Fresh:
    if standing is None:
        return _Fresh(reached=START, age_s=None, canary_s=None)
    canary = canary_at(log.near_reader(), sequence=standing.sequence, reached=standing.reached)
    ages = [
        log_age_s,
        pending_age_s(log.reader(), sequence=standing.sequence, offset=standing.offset, now=now),
        0.0 if standing.waiting_since is None else now.timestamp() - standing.waiting_since,
    ]
    return _Fresh(reached=standing.reached, age_s=oldest(ages), canary_s=None if canary is None else canary.age_s(now))


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

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What is known; no age while the source does not answer."""
        status = capture_status(self._config, self._config.app(self._app).source)
        fresh = app_freshness(self._config, self._app, log_age_s=status.lag_s, now=datetime.now(UTC))
        return self.of(fresh)

    def of(self, fresh: AppFreshness) -> Iterator[GaugeMetricFamily]:
        """What is known of an app that is so fresh."""
        families = age, canary, member_age, member_canary, member_keys = age_metrics()
        _add(age, [self._app], fresh.age_s)
        _add(canary, [self._app], fresh.canary_s)
        for member in fresh.members:
            _add(member_age, [self._app, member.name], member.age_s)
            _add(member_canary, [self._app, member.name], member.canary_s)
            for standing in ("to_do", "held", "dead") if member.said is not None else ():
                _add(member_keys, [self._app, member.name, standing], getattr(member.said, standing))
        yield from families

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Without asking."""
        return age_metrics()


def _add(family: GaugeMetricFamily, labels: Sequence[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)


def age_metrics() -> tuple[GaugeMetricFamily, ...]:
    """The metrics without a sample: of the app, then of each member where it has shares."""
    return (
        GaugeMetricFamily(
            "deltaworks_process_age_seconds",
            "Nothing that was committed longer ago than this is missing in the app's sinks, dead letters aside; of an "
            "app with shares that of the oldest member, on whatever machine.",
            labels=["app"],
        ),
        GaugeMetricFamily(
            "deltaworks_process_canary_age_seconds",
            "How long ago the newest canary was written that the app's sinks were told of, by every member of an app "
            "with shares; it grows while nothing comes.",
            labels=["app"],
        ),
        GaugeMetricFamily(
            "deltaworks_process_member_age_seconds",
            "The same as the app's age for the entities of one member's shares; `member` is its machine and process.",
            labels=["app", "member"],
        ),
        GaugeMetricFamily(
            "deltaworks_process_member_canary_age_seconds",
            "The same as the app's canary for the sinks of one member.",
            labels=["app", "member"],
        ),
        GaugeMetricFamily(
            "deltaworks_process_member_keys",
            "Keys of one member's shares by where they stand, as it said last, also where it has ended since: to_do, "
            "held, dead (of steps under on_change, too).",
            labels=["app", "member", "standing"],
        ),
    )
