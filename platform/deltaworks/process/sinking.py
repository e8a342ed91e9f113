"""The sinks of one app, written and flushed together, and how far they were told that they are."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.position import Lsn
from deltaworks.process.app import App
from deltaworks.process.pipeline import Outcome
from deltaworks.process.sink import BesideSpec, Refusal, Sink


def open_sinks(app: App, *, name: str, config: Config, resources: ExitStack) -> list[Sink]:
    """Open every sink of the app `name`, in their order; they close with the stack.

    Raises:
        RetryableError: a server is not there now.
        TerminalError: a sink's store cannot be used.
    """
    sinks: list[Sink] = []
    for spec in app.sinks:
        first = next((sink for sink, other in zip(sinks, app.sinks, strict=False) if type(other) is type(spec)), None)
        if first is not None and isinstance(spec, BesideSpec):
            sink = spec.open_beside(first, key=app.document_key)
        else:
            sink = spec.open(app=name, key=app.document_key, config=config)
        resources.callback(sink.close)
        sinks.append(sink)
    return sinks


class Sinking:
    """Every sink in turn. Serves one thread at a time: who lets a thread of its own flush waits for it."""

    def __init__(self, app: App, sinks: Sequence[Sink], *, reached: Lsn) -> None:
        self.reached = reached
        """Everything committed at or before it is in every sink."""
        self.flushed_at = 0.0
        """When that was last told, on the monotonic clock."""
        self._app = app
        self._sinks = sinks

    def write(self, outcome: Outcome) -> None:
        """Hand each sink its documents; nothing of it is durable before `flush`."""
        for spec, sink in zip(self._app.sinks, self._sinks, strict=True):
            faults.reach("process.before_write")
            if outcome.documents:
                sink.write(faults.hand_over("process.write", outcome.documents_for(spec.name)))
            faults.reach("process.after_write")

    def flush(self, position: Lsn) -> list[tuple[str, Sequence[Refusal]]]:
        """Flush every sink and take note of it; gives the refusals of those that had any.

        Raises:
            SinkAwayError: a sink is away; nothing that was written may be taken as durable.
        """
        refusals = self.flush_all(position)
        self.note(position)
        return refusals

    def flush_all(self, position: Lsn) -> list[tuple[str, Sequence[Refusal]]]:
        """Flush every sink, in whatever thread; `note` follows in the one that runs the app."""
        refusals = []
        for sink in self._sinks:
            if refused := sink.flush(up_to=position):
                refusals.append((sink.name, refused))
            faults.reach("process.after_flush")
        return refusals

    def note(self, position: Lsn) -> None:
        """Take note that every sink was told of a position."""
        self.reached = position
        self.flushed_at = time.monotonic()
