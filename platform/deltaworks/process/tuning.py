"""Limits of steps that are changed while an app runs: a small file in the app's folder, read again when it changes.

`{"people.concurrency": 8, "people.rate_per_s": 200}`; the name before the dot is what the enrichment goes into.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import structlog

from deltaworks.errors import TerminalError
from deltaworks.process.app import App
from deltaworks.process.enriching.enrich import Enricher

TUNING_FILE = "tuning.json"
"""In the folder of the app."""
OPTIONS = {"concurrency": int, "rate_per_s": float}

logger = structlog.get_logger(__name__)


class TuningError(TerminalError):
    """A limit that is to be changed does not exist or cannot have that value."""


def read_tuning(file: Path) -> Mapping[str, float]:
    """What was set; empty when nothing was."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {str(name): float(value) for name, value in found.items()}


def save_tuning(file: Path, app: App, changes: Mapping[str, str]) -> Mapping[str, float]:
    """Set limits, and take those back whose value is empty; durable when this returns. Gives all that are set.

    Raises:
        TuningError: no such step or option, or a value that is not a number above 0.
    """
    known = [f"{step.into}.{option}" for step in app.enrichments for option in OPTIONS]
    wanted = dict(read_tuning(file))
    for name, text in changes.items():
        if name not in known:
            raise TuningError(f"app {app.name!r} has no limit {name!r}; known: {', '.join(known) or 'none'}")
        if not text:
            wanted.pop(name, None)
            continue
        try:
            value = OPTIONS[name.rpartition(".")[2]](text)
        except ValueError:
            value = 0
        if value <= 0:
            raise TuningError(f"cannot set {name!r} to {text!r}; give a number above 0")
        wanted[name] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".new")
    with draft.open("w", encoding="utf-8") as out:
        json.dump(wanted, out)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
    return wanted


class Tuning:
    """Brings what is set to the enrichments of a running app."""

    def __init__(self, file: Path, enrichers: Mapping[str, Enricher], *, app: str) -> None:
        self._file = file
        self._enrichers = enrichers
        self._app = app
        self._read_at: int | None = None

    def refresh(self) -> None:
        """Apply the file if it changed since the last call; a look at it costs some microseconds."""
        try:
            changed_at = self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed_at == self._read_at:
            return
        self._read_at = changed_at
        wanted = read_tuning(self._file)
        for into, enricher in self._enrichers.items():
            concurrency = int(wanted.get(f"{into}.concurrency", enricher.step.concurrency))
            rate_per_s = wanted.get(f"{into}.rate_per_s", enricher.step.rate_per_s)
            enricher.tune(concurrency=concurrency, rate_per_s=rate_per_s)
        logger.info("app tuned", app=self._app, **{name.replace(".", "_"): value for name, value in wanted.items()})
