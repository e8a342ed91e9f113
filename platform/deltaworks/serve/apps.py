"""How every app of the configuration is doing, read off the files that its service keeps.

Of a shared app, off those of every member on this machine, and by what the others say in their group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from deltaworks.config import Config
from deltaworks.log.change_log import LogReader
from deltaworks.log.holder import holder_of
from deltaworks.log.registry import log_of
from deltaworks.position import START
from deltaworks.process.asked import Asking, read_asking
from deltaworks.process.letters import Letter, letters_of
from deltaworks.process.live import Live, read_live
from deltaworks.process.live_total import total_of
from deltaworks.process.pausing import Pause
from deltaworks.process.requests import Request, Requests
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.shared.member_letters import letters_over
from deltaworks.process.shared.members import NOBODY, Member, folders_here, members_of
from deltaworks.process.standing import Standings, read_standings
from deltaworks.serve.group import Group

LETTERS = 50
"""Dead letters that are shown; all are counted."""
SILENT_AFTER_S = 5.0
"""A service that has not written its status for so long hangs, or its machine does."""

State = Literal["running", "paused", "silent", "stopped"]
MemberState = Literal["running", "paused", "silent", "stopped", "elsewhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """One member of a shared app. `live` is known of those that run here alone, `standings` of all."""

    member: Member
    state: MemberState
    live: Live | None
    standings: Standings

    @property
    def dead(self) -> int:
        """Dead letters: of entities, and of steps under `on_change`."""
        return self.standings.dead + self.standings.dead_turns

    @property
    def documents_per_s(self) -> float:
        """Of the last ten seconds, or since the second to last that was heard of one elsewhere."""
        if self.live is not None or self.member.said is None or self.state != "elsewhere":
            return 0.0 if self.live is None else self.live.documents_per_s
        return self.member.said.documents_per_s

    @property
    def lag_p99_s(self) -> float | None:
        """Of the last minute; not known of one elsewhere."""
        return None if self.live is None else self.live.lag_p99_s

    @property
    def waits_s(self) -> float:
        """How long ago the oldest change was committed that is to do or held."""
        since = self.standings.waiting_since
        return 0.0 if since is None else max(0.0, datetime.now(UTC).timestamp() - since)

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The view as JSON values."""
        return {
            "name": self.member.name,
            "state": self.state,
            "pid": self.member.pid,
            "shares": list(self.member.own),
            "waiting_shares": list(self.member.waiting),
            "text": self.member.text,
            "position": str(self.standings.reached),
            "documents_per_s": self.documents_per_s,
            "lag_p99_s": self.lag_p99_s,
            "waits_s": round(self.waits_s, 3),
            "to_do": self.standings.to_do,
            "held": self.standings.held,
            "dead": self.dead,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AppView:
    """One app at one moment. `live` is absent where no service runs; `behind` counts changes not folded yet; `asking`
    has how far the requests are that have begun.

    Of a shared app all of these are over its `members`; `group_fault` is why those elsewhere are not known.
    """

    name: str
    source: str
    state: State
    pid: int | None
    paused_since: datetime | None
    standings: Standings
    behind: int
    live: Live | None
    letters: Sequence[Letter]
    asked: Sequence[Request]
    asking: Mapping[str, Asking]
    is_shared: bool
    members: Sequence[MemberView] = ()
    group_fault: str | None = None

    @property
    def is_reprocessed(self) -> bool:
        """Whether all of its documents are being made anew, or will be."""
        return any(request.is_of_all for request in self.asked)

    @property
    def dead(self) -> int:
        """Dead letters: of entities, and of steps under `on_change`."""
        return self.standings.dead + self.standings.dead_turns

    def may_see_to(self, letter: Letter) -> bool:
        """Whether anybody here can retry or drop a letter: its member, if it has one, runs."""
        return letter.member is None or any(
            each.member.name == letter.member and each.member.pid is not None for each in self.members
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The view as JSON values; keys of dead letters are row data and stay out."""
        return {
            "name": self.name,
            "source": self.source,
            "state": self.state,
            "pid": self.pid,
            "paused_since": None if self.paused_since is None else self.paused_since.isoformat(),
            "position": str(self.standings.reached),
            "behind": self.behind,
            "to_do": self.standings.to_do,
            "held": self.standings.held,
            "dead": self.dead,
            "requests": [request.kind.value for request in self.asked],
            "live": None if self.live is None else self.live.to_json(),
            "members": [each.to_json() for each in self.members],
        }


class Apps:
    """Every app of a configuration. Opens no database but the apps' own files, for reading."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._logs: dict[str, LogReader] = {}
        self._groups: dict[str, Group] = {}
        for name, app in config.apps.items():
            if app.shares is not None:
                log = log_of(config, app.source)
                self._groups[name] = Group(partial(log.shares_of, name, shares=app.shares))

    def read(self) -> list[AppView]:
        """All of them as of now, in the order of the configuration."""
        return [self._read(name) for name in self._config.apps]

    def _read(self, name: str) -> AppView:
        return self._of_service(name) if self._config.app(name).shares is None else self._of_members(name)

    def _of_service(self, name: str) -> AppView:
        folder = self._config.app_folder(name)
        source = self._config.app(name).source
        pid = holder_of(folder / "lock")
        live = read_live(folder) if pid is not None else None
        paused_since = Pause(folder).since()
        standings = read_standings(folder)
        asked = Requests.of(folder).open()
        begun = {request.id: read_asking(folder / STATE_FILE, request.id) for request in asked}
        return AppView(
            name=name,
            source=source,
            state=_state(live, is_held=pid is not None, is_paused=paused_since is not None),
            pid=pid,
            paused_since=paused_since,
            standings=standings,
            behind=self._behind(source, standings.offset),
            live=live,
            letters=letters_of(folder / STATE_FILE, limit=LETTERS),
            asked=asked,
            asking={id_: asking for id_, asking in begun.items() if asking is not None},
            is_shared=False,
        )

    def _of_members(self, name: str) -> AppView:
        said, fault = self._groups[name].look()
        members = members_of(said, folders_here(self._config, name))
        paused_since = Pause(self._config.app_folder(name)).since()
        views = [_member_view(member, is_paused=paused_since is not None) for member in members]
        source = self._config.app(name).source
        standings = _total(views)
        # Each reads the whole log; where none does, the next one goes on from its own state.
        reading = [each.standings.offset for each in views if not each.member.is_gone]
        behind = self._behind(source, min(reading, default=max((each.standings.offset for each in views), default=0)))
        asked = {request.id: request for each in views for request in _asked(each.member)}
        states = {each.state for each in views}
        known: tuple[State, ...] = ("running", "paused", "silent")
        found: State = next((state for state in known if state in states), "stopped")
        return AppView(
            name=name,
            source=source,
            state="paused" if paused_since is not None else found,
            pid=None,
            paused_since=paused_since,
            standings=standings,
            behind=behind,
            live=total_of([each.live for each in views if each.live is not None]),
            letters=letters_over(members, limit=LETTERS),
            asked=sorted(asked.values(), key=lambda request: request.id),
            asking={},
            is_shared=True,
            members=views,
            group_fault=fault,
        )

    def _behind(self, source: str, offset: int) -> int:
        if source not in self._logs:
            self._logs[source] = log_of(self._config, source).near_reader()
        return max(0, self._logs[source].end().offset - offset)


def _member_view(member: Member, *, is_paused: bool) -> MemberView:
    live = None if member.pid is None or member.folder is None else read_live(member.folder)
    state: MemberState = _state(live, is_held=member.pid is not None, is_paused=is_paused and member.pid is not None)
    if member.folder is None:
        state = "stopped" if member.is_gone or member.name == NOBODY else "elsewhere"
    return MemberView(member=member, state=state, live=live, standings=member.standings())


def _asked(member: Member) -> Sequence[Request]:
    return () if member.folder is None or member.pid is None else Requests.of(member.folder).open()


def _total(views: Sequence[MemberView]) -> Standings:
    """Over all members: how many keys, and as far as every one of them that has shares."""
    standings = [each.standings for each in views]
    since = [each.waiting_since for each in standings if each.waiting_since is not None]
    return Standings(
        to_do=sum(each.to_do for each in standings),
        held=sum(each.held for each in standings),
        dead=sum(each.dead for each in standings),
        dead_turns=sum(each.dead_turns for each in standings),
        sequence=min((each.sequence for each in standings), default=-1),
        offset=min((each.offset for each in standings), default=0),
        reached=min((each.standings.reached for each in views if each.member.shares), default=START),
        waiting_since=min(since, default=None),
    )


def _state(live: Live | None, *, is_held: bool, is_paused: bool) -> State:
    if is_paused:
        return "paused"
    if not is_held:
        return "stopped"
    if live is not None and (datetime.now(UTC) - live.at).total_seconds() > SILENT_AFTER_S:
        return "silent"
    return "running"
