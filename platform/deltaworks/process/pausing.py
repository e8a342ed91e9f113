"""Pausing an app: a file in its folder says so, whoever runs it sees it within a moment, and it outlives restarts.

A paused app keeps its place and its lease, takes no change and calls no service. What was in hand is finished first.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from deltaworks.errors import TerminalError
from deltaworks.request_folder import write_json

LOOK_EVERY_S = 0.2
"""How often a paused runner looks whether it may go on."""


class AppPausedError(TerminalError):
    """An app was paused by a person, so it may not be run up to now."""


class Pause:
    """The switch of one app, in its folder, which need not exist yet. Any process may turn it."""

    def __init__(self, app_folder: Path) -> None:
        self._file = app_folder / "paused.json"

    def pause(self) -> None:
        """Let the app stand still from now on; durable when this returns. Does nothing to one that is paused."""
        if not self.is_on:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"since": datetime.now(UTC).isoformat()})

    def resume(self) -> None:
        """Let it go on; does nothing to one that runs."""
        self._file.unlink(missing_ok=True)

    def check(self, app: str) -> None:
        """Let an app through that is not paused.

        Raises:
            AppPausedError: it is.
        """
        if (since := self.since()) is not None:
            raise AppPausedError(
                f"cannot run app {app!r}: it is paused since {since:%F %T} UTC; resume it first, "
                f"with `deltaworks process {app} --resume` or on the page of apps"
            )

    @property
    def is_on(self) -> bool:
        """Whether the app is paused; one look at the folder."""
        return self._file.exists()

    def since(self) -> datetime | None:
        """When it was paused; `None` when it is not."""
        try:
            return datetime.fromisoformat(json.loads(self._file.read_text(encoding="utf-8"))["since"])
        except FileNotFoundError:
            return None
