"""Replay: an app run over the log again, and what it makes compared with what its sinks hold.

    log ──► app, running        ──► its sinks ───────┐
      └───► app, as it is now   ──► fresh sinks ─────┴─► what differs, both ways

A fresh replay has a home of its own, `replay/<app>/<name>`: state, index, log and lake. It stops where the running app
stands, so both have seen the same; what moves meanwhile is looked at again. Transitions are not told again.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from deltaworks.config import Config, LakeConfig
from deltaworks.errors import TerminalError
from deltaworks.log.change_log import LogReader
from deltaworks.log.holder import holder_of
from deltaworks.log.registry import open_reader as open_log
from deltaworks.log.until import LogUntil, last_group_at, position_before
from deltaworks.operate.app import work_progress
from deltaworks.operate.asking import reprocess
from deltaworks.operate.log import OnProgress
from deltaworks.position import START, Lsn, MalformedPositionError
from deltaworks.process.app import App
from deltaworks.process.compare import Comparing, Comparison
from deltaworks.process.registry import load_app
from deltaworks.process.runner import Runner
from deltaworks.process.sink import SinkReader, SinkSpec, key_text, open_reader
from deltaworks.process.standing import read_standings, waiting_keys
from deltaworks.store.sinks.nowhere import Nowhere

SAME = "same"
"""What `into` says for the app's own sinks."""
ROUNDS = 5
"""How often what moves is looked at again."""


class ReplayError(TerminalError):
    """An app cannot be replayed as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A replay after `start`, and what came of it at each sink.

    `left_out` sinks were not written to or cannot be read back. `waiting` keys wait or are dead in either and are not
    compared; `newly_waiting` of them do in the replay alone.
    """

    app: str
    into: str
    start: Lsn
    position: Lsn
    documents: int
    comparisons: Sequence[Comparison]
    left_out: Sequence[str] = ()
    waiting: int = 0
    newly_waiting: int = 0

    @property
    def differing(self) -> int:
        """Keys that differ, over all sinks."""
        return sum(each.differing for each in self.comparisons)

    @property
    def may_replace(self) -> bool:
        """Whether the app as it is now makes what the sinks hold."""
        return not (self.differing or self.newly_waiting or any(each.moving for each in self.comparisons))

    @property
    def verdict(self) -> str:
        """What to make of it, in one sentence."""
        if self.differing:
            return f"{self.differing:,} keys differ: look at them before the new version replaces the old one"
        if self.newly_waiting:
            return (
                f"the new version may not replace the old one: {self.newly_waiting:,} keys fail or wait that did not "
                "before"
            )
        if moving := sum(each.moving for each in self.comparisons):
            return f"{moving:,} keys kept changing and were not compared: replay again when less is written"
        if not any(each.new or each.old for each in self.comparisons):
            return "nothing was compared: no entity changed after the start"
        if self.into == SAME:
            return "nothing changed: the sinks hold what the app makes"
        return "the new version may replace the old one: it makes the same documents"

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """All of it as JSON values; examples are keys."""
        return {
            "app": self.app,
            "into": self.into,
            "after": str(self.start),
            "position": str(self.position),
            "documents": self.documents,
            "may_replace": self.may_replace,
            "verdict": self.verdict,
            "waiting": self.waiting,
            "newly_waiting": self.newly_waiting,
            "left_out": list(self.left_out),
            "sinks": [each.to_json() for each in self.comparisons],
        }


def parse_start(text: str) -> Lsn | datetime:
    """A position of the source, or a time in ISO 8601, in UTC where it says no zone.

    >>> str(parse_start("0/16B3748")), parse_start("2026-11-25T17:00").isoformat()
    ('0/16B3748', '2026-11-25T17:00:00+00:00')

    Raises:
        ReplayError: it is neither.
    """
    try:
        return Lsn.parse(text)
    except MalformedPositionError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ReplayError(
            f"cannot begin at {text!r}: expected a position such as 0/16B3748, or a time such as 2026-11-25T17:00"
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def replay(
    config: Config,
    app: str,
    *,
    start: Lsn | datetime = START,
    into: str = "trial",
    on_progress: OnProgress | None = None,
) -> Replayed:
    """Make the documents of all entities that changed after a position, or from a time on, anew; and compare.

    Rows are folded from the log's start whatever `start` says, because an entity is more than its last changes. `into`
    names a replay with sinks of its own, made anew, or is `same` for the app's sinks: then whoever runs the app does
    it, and versions keep every newer document.

    Raises:
        ReplayError: the app never ran, has nothing that could be compared, or sums up windows from a later start.
        OffsetRetiredError: the log no longer has its start.
        DeltaworksError: whatever the app's run raises.
    """
    loaded = load_app(config, app)
    log = open_log(config, loaded.source)
    position = start if isinstance(start, Lsn) else position_before(log, start)
    if read_standings(config.app_folder(app)).sequence < 0:
        raise ReplayError(f"cannot replay app {app!r}: it never ran, so there is nothing to compare with; run it first")
    if loaded.windowing is not None and position > START:
        raise ReplayError(
            f"cannot replay app {app!r} from {position}: its windows sum up what came before; leave --from out"
        )
    if into == SAME:
        return _into_same(config, app, loaded, position, on_progress)
    return _into_fresh(config, app, loaded, log, position, into=into, on_progress=on_progress)


def _into_fresh(
    config: Config,
    name: str,
    app: App,
    log: LogReader,
    position: Lsn,
    *,
    into: str,
    on_progress: OnProgress | None,
) -> Replayed:
    specs = [spec for spec in app.sinks if spec.capabilities.is_in_home and spec.capabilities.can_read_back]
    if not specs:
        raise ReplayError(
            f"cannot replay app {name!r} into {into!r}: none of its sinks is in the home folder, where it could have "
            "another one; add a LakeTable, or use `--into same`"
        )
    fresh = _fresh_home(config, name, into)
    trial = app.replayed([spec if spec in specs else Nowhere(spec.name) for spec in app.sinks])
    until = LogUntil(log, sequence=read_standings(config.app_folder(name)).sequence)
    with Runner.open(trial, config=fresh, name=name, log=until) as runner, Comparing(fresh.home / "compared") as both:
        first = min(last_group_at(log, position), until.end().sequence)
        if first >= 0:
            runner.skip(first)
        for _ in range(ROUNDS):
            report = runner.drain(on_progress=work_progress(f"{name}, again", on_progress))
            standings = read_standings(config.app_folder(name))
            old_waiting, new_waiting = _waiting(config, name), _waiting(fresh, name)
            comparisons = []
            for spec in specs:
                both.take_old(_reader(spec, name, app, config))
                both.take_new(_reader(spec, name, app, fresh))
                settled = min(report.position, standings.reached)
                apart = old_waiting | new_waiting
                comparisons.append(both.compare(sink=_title(spec), after=position, settled=settled, apart=apart))
            if not any(each.moving for each in comparisons):
                break
            until.move(standings.sequence)
    return Replayed(
        app=name,
        into=into,
        start=position,
        position=report.position,
        documents=report.documents,
        comparisons=comparisons,
        left_out=[_title(spec) for spec in app.sinks if spec not in specs],
        waiting=len(old_waiting | new_waiting),
        newly_waiting=len(new_waiting - old_waiting),
    )


def _into_same(config: Config, name: str, app: App, position: Lsn, on_progress: OnProgress | None) -> Replayed:
    able = [(spec, spec.capabilities) for spec in app.sinks]
    specs = [spec for spec, can in able if can.can_read_back and not can.may_forget and not can.is_event]
    if not specs:
        raise ReplayError(f"cannot compare app {name!r} with itself: none of its sinks can be read back")
    folder = config.home / "replay" / name / SAME
    before, old_waiting = read_standings(config.app_folder(name)), _waiting(config, name)
    comparings = [Comparing(folder / str(number)) for number, _ in enumerate(specs)]
    try:
        keys: set[str] = set()
        for spec, both in zip(specs, comparings, strict=True):
            both.take_old(_reader(spec, name, app, config))
            keys.update(both.old_keys(after=position))
        done = work_progress(f"{name}, again", on_progress)
        answered = reprocess(config, name, keys=sorted(keys) if position > START else None, on_progress=done)
        new_waiting = _waiting(config, name)
        comparisons = []
        for spec, both in zip(specs, comparings, strict=True):
            both.take_new(_reader(spec, name, app, config))
            apart = old_waiting | new_waiting
            comparisons.append(both.compare(sink=_title(spec), after=position, settled=before.reached, apart=apart))
    finally:
        for both in comparings:
            both.close()
    return Replayed(
        app=name,
        into=SAME,
        start=position,
        position=before.reached,
        documents=answered.outcome.count,
        comparisons=comparisons,
        left_out=[_title(spec) for spec in app.sinks if spec not in specs],
        waiting=len(old_waiting | new_waiting),
        newly_waiting=len(new_waiting - old_waiting),
    )


def _fresh_home(config: Config, app: str, into: str) -> Config:
    """The configuration with a home of its own that is empty."""
    if not into.isidentifier():
        raise ReplayError(f"cannot replay app {app!r} into {into!r}: use letters, digits and _, or `same`")
    home = config.home / "replay" / app / into
    fresh = config.model_copy(update={"home": home, "lake": LakeConfig()})
    if (process := holder_of(fresh.app_folder(app) / "lock")) is not None:
        raise ReplayError(
            f"cannot replay app {app!r} into {into!r}: process {process} does so now; wait for it, or use another name"
        )
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)
    return fresh


def _reader(spec: SinkSpec, name: str, app: App, config: Config) -> SinkReader:
    return open_reader(spec, app=name, key=app.document_key, config=config)


def _title(spec: SinkSpec) -> str:
    return f"{type(spec).__name__} {spec.name}"


def _waiting(config: Config, app: str) -> set[str]:
    return {key_text(key) for key in waiting_keys(config.app_folder(app))}
