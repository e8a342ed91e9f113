"""How far everything has got: what a load would bring, and one line for each log, app and lake."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from deltaworks.capture.continuity import Gap
from deltaworks.config import Config
from deltaworks.gate.release import current_release
from deltaworks.log.registry import holder, log_of, open_reader
from deltaworks.log.status import CaptureStatus
from deltaworks.operate.freshness import AppFreshness, Freshness, app_freshness, lake_age_s
from deltaworks.operate.lake import open_lake
from deltaworks.operate.log import opened
from deltaworks.store.lake import Lake
from deltaworks.store.load import last_load


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """Whether there is anything to load. `place` names the end that a load would reach; equal places need one load."""

    is_behind: bool
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRow:
    """One line of `deltaworks status`. Nothing committed longer ago than `age_s` is missing; `None`: not known."""

    what: str
    position: str
    offset: str
    state: str
    age_s: float | None = None


def behind(config: Config, source: str) -> Behind:
    """Compare a source with its log, where no service captures, and the logs of it and of its apps with the lake.

    Offsets are compared, which count changes: a log that only notes a newer position is not ahead.

    Raises:
        SourceUnreachableError: no service captures and the source does not answer.
    """
    logs = [source, *(name for name, app in config.apps.items() if app.source == source)]
    ends = {log: open_reader(config, log).end().offset for log in logs}
    place = " ".join(f"{log}@{offset}" for log, offset in ends.items())
    with open_lake(config) as lake:
        if any(last_load(lake, log).next_offset < offset for log, offset in ends.items()):
            return Behind(is_behind=True, place=place)
    if holder(config, source) is None:
        with opened(config, source) as database:
            if database.has_uncaptured():
                # No position: the server's log moves on by itself, and by what other databases do.
                return Behind(is_behind=True, place=f"{place} and more in the database")
    return Behind(is_behind=False, place=place)


def status(config: Config, *, captured: Sequence[CaptureStatus] = ()) -> Sequence[StatusRow]:
    """Every log, every app, and what is released; how fresh they are by what the sources were `captured` to."""
    lags, now = {each.source: each.lag_s for each in captured}, datetime.now(UTC)
    apps = {
        name: app_freshness(config, name, log_age_s=lags.get(app.source), now=now) for name, app in config.apps.items()
    }
    ages = lags | {name: fresh.age_s for name, fresh in apps.items()}
    with open_lake(config) as lake:
        return [*_logs(config, lake, ages, now=now), *_apps(apps), _release(lake)]


def _logs(config: Config, lake: Lake, ages: Mapping[str, float | None], *, now: datetime) -> Iterator[StatusRow]:
    for name in [*config.sources, *config.apps]:
        log = log_of(config, name)
        end, writer = log.reader().end(), log.holder()
        service = f"written by process {writer}" if writer is not None else "no writer"
        gaps = [Gap.from_json(gap).summary for gap in end.progress.get("gaps", ())]
        state = "; ".join([service, *(f"GAP, the tables are dumped again: {gap}" for gap in gaps)])
        age_s = ages.get(name)
        yield StatusRow(
            what=f"log {name}", position=str(end.position), offset=f"{end.offset:,}", state=state, age_s=age_s
        )
        loaded = last_load(lake, name)
        missing = end.offset - loaded.next_offset
        yield StatusRow(
            what=f"lake {name}",
            position=str(loaded.position),
            offset=f"{loaded.next_offset:,}",
            state="at the end of its log" if not missing else f"{missing:,} changes behind its log",
            age_s=lake_age_s(log.near_reader(), loaded, log_age_s=age_s, now=now),
        )


def _apps(apps: Mapping[str, AppFreshness]) -> Iterator[StatusRow]:
    for name, fresh in apps.items():
        yield _app_row(f"app {name}", fresh)
        for member in fresh.members:
            yield _app_row(f"app {name}, {member.name}", member, member.text)


def _app_row(what: str, fresh: Freshness, *said: str) -> StatusRow:
    canary = () if fresh.canary_s is None else (f"canary {fresh.canary_s:,.0f} s ago",)
    return StatusRow(
        what=what, position=str(fresh.reached), offset="", state="; ".join((*canary, *said)), age_s=fresh.age_s
    )


def _release(lake: Lake) -> StatusRow:
    release = current_release(lake)
    if release is None:
        return StatusRow(what="release", position="", offset="", state="nothing is released yet")
    return StatusRow(
        what="release",
        position="",
        offset="",
        state=f"{release.id}: lake version {release.version}, {release.released_at:%F %T} UTC",
    )
