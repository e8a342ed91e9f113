"""A change whose step cannot be ended: kept as the process ends, a dead letter in its next life; see `stuck`."""

import os
from pathlib import Path
from types import CodeType, FrameType

import structlog

from deltaworks.process.declared import Step
from deltaworks.process.pipeline import Pipeline
from deltaworks.process.state import State
from deltaworks.process.stuck import EXIT_STUCK, STUCK_FILE, Holder, Stuck, change_in
from deltaworks.process.telling import Telling

_HOLDERS: dict[CodeType, Holder] = {
    Pipeline._call_each.__code__: lambda names: names.get("entity"),
    Pipeline._answers.__code__: lambda names: names["entities"][len(names["answers"])],
    Telling._tell.__code__: lambda names: names.get("turn"),
}
"""Where the change is that a step was called for."""

logger = structlog.get_logger(__name__)


class Burying:
    """Tells the steps of one app which change is not to be tried, until its letter is written."""

    def __init__(self, name: str, *, folder: Path, state: State, pipeline: Pipeline, telling: Telling) -> None:
        self._name = name
        self._folder = folder
        self._state = state
        self._pipeline = pipeline
        self._telling = telling
        self._pipeline.stuck = self._telling.stuck = Stuck.read(folder)

    def end_process(self, frame: FrameType, step: Step, seconds: float) -> None:
        """Keep the change that a step is stuck on, and end; nothing where no single change is to blame."""
        change = change_in(frame, _HOLDERS)
        if change is None:
            # A call for many: none of them is known to be at fault, and the next life would come here again.
            return
        key, version = change
        Stuck(
            step=step.name,
            place=f"{frame.f_code.co_filename}:{frame.f_lineno}",
            seconds=seconds,
            key=key,
            position=version.position.value,
            ordinal=version.ordinal,
        ).write(self._folder)
        logger.error("process ends, a step cannot be ended", app=self._name, step=step.name, place=step.place)
        os._exit(EXIT_STUCK)

    def forget(self) -> None:
        """Once its letter is written a retry has to try it; one lookup by key while there is such a change."""
        stuck = self._pipeline.stuck
        if stuck is not None and self._state.letters.has(step=stuck.step, key=stuck.key, since=stuck.version):
            (self._folder / STUCK_FILE).unlink(missing_ok=True)
            self._pipeline.stuck = self._telling.stuck = None
