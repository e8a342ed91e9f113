"""Tries out which columns the documents of a running app are made of, for whoever asks; see `lineage`."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaworks.process import lineage
from deltaworks.process.app import App
from deltaworks.process.lineage import SAMPLES, observe_in_loop
from deltaworks.process.pipeline import Pipeline


class Observing:
    """Does it once in the life of a runner, on a few entities that it has processed. Serves the runner's thread."""

    def __init__(
        self,
        app: App,
        *,
        pipeline: Pipeline,
        clients: Mapping[str, Any],  # Any: what each client is, its step knows
        loop: asyncio.Runner,
        file: Path,
    ) -> None:
        self._app = app
        self._pipeline = pipeline
        self._clients = clients
        self._loop = loop
        self._file = file
        self._is_done = False

    @property
    def is_owed(self) -> bool:
        """Whether there is anything to try it on, and it was not done yet."""
        return bool(self._pipeline.samples) and not self._is_done

    def when_sampled(self) -> None:
        """Do it if there are as many entities as are wanted."""
        if not self._is_done and len(self._pipeline.samples) == SAMPLES:
            self.run()

    def run(self) -> None:
        """Do it on the entities there are; steps run."""
        self._is_done = True
        seen = observe_in_loop(self._app, tuple(self._pipeline.samples), clients=self._clients)
        lineage.save(self._loop.run(seen), self._file)
