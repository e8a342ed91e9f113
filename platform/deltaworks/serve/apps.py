"""How every app of the configuration is doing, read off the files that its service keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from deltaworks.config import Config
from deltaworks.log.change_log import LogReader
from deltaworks.log.holder import holder_of
from deltaworks.log.registry import log_of
from deltaworks.process.asked import Asking, read_asking
from deltaworks.process.letters import Letter, letters_of
from deltaworks.process.live import Live, read_live
from deltaworks.process.pausing import Pause
from deltaworks.process.requests import Request, Requests
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.standing import Standings, read_standings

LETTERS = 50
"""Dead letters that are shown; all are counted."""
SILENT_AFTER_S = 5.0
"""A service that has not written its status for so long hangs, or its machine does."""

State = Literal["running", "paused", "silent", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppView:
    """One app at one moment. `live` is absent where no service runs; `behind` counts changes not folded yet; `asking`
    has how far the requests are that have begun.
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

    @property
    def is_reprocessed(self) -> bool:
        """Whether all of its documents are being made anew, or will be."""
        return any(request.is_of_all for request in self.asked)

    @property
    def dead(self) -> int:
        """Dead letters: of entities, and of steps under `on_change`."""
        return self.standings.dead + self.standings.dead_turns

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
        }


class Apps:
    """Every app of a configuration. Opens no database but the apps' own files, for reading."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._logs: dict[str, LogReader] = {}

    def read(self) -> list[AppView]:
        """All of them as of now, in the order of the configuration."""
        return [self._read(name) for name in self._config.apps]

    def _read(self, name: str) -> AppView:
        folder = self._config.app_folder(name)
        source = self._config.app(name).source
        pid = holder_of(folder / "lock")
        live = read_live(folder) if pid is not None else None
        paused_since = Pause(folder).since()
        standings = read_standings(folder)
        if source not in self._logs:
            self._logs[source] = log_of(self._config, source).near_reader()
        end = self._logs[source].end()
        asked = Requests.of(folder).open()
        begun = {request.id: read_asking(folder / STATE_FILE, request.id) for request in asked}
        return AppView(
            name=name,
            source=source,
            state=_state(live, is_held=pid is not None, is_paused=paused_since is not None),
            pid=pid,
            paused_since=paused_since,
            standings=standings,
            behind=max(0, end.offset - standings.offset),
            live=live,
            letters=letters_of(folder / STATE_FILE, limit=LETTERS),
            asked=asked,
            asking={id_: asking for id_, asking in begun.items() if asking is not None},
            is_shared=self._config.app(name).shares is not None,
        )


def _state(live: Live | None, *, is_held: bool, is_paused: bool) -> State:
    if is_paused:
        return "paused"
    if not is_held:
        return "stopped"
    if live is not None and (datetime.now(UTC) - live.at).total_seconds() > SILENT_AFTER_S:
        return "silent"
    return "running"
