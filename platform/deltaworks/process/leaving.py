"""Between the steps and the sinks: what is held back because it left already, and what becomes a window's document."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deltaworks.process import metrics
from deltaworks.process.app import App
from deltaworks.process.fold import Key
from deltaworks.process.pipeline import Outcome
from deltaworks.process.sink import Document
from deltaworks.process.state import State
from deltaworks.process.waiting import Setback, Waiting
from deltaworks.process.windows import Place


@dataclass(slots=True, kw_only=True)
class Leave:
    """What goes to the sinks, and what is to be remembered when they are durable."""

    outcome: Outcome
    hashes: Mapping[Key, bytes] = field(default_factory=dict)
    places: Sequence[Place] = ()
    settled: Sequence[Key] = ()

    def forget(self, refused: Collection[Key]) -> None:
        """Remember nothing of documents that a sink refused, so that the same ones may leave again."""
        self.hashes = {key: content for key, content in self.hashes.items() if key not in refused}
        self.settled = [key for key in self.settled if key not in refused]


class Leaving:
    """The `dedup` and `window` of an app over its state; of an app with neither, everything leaves as it is."""

    def __init__(self, app: App, *, name: str, state: State) -> None:
        self._dedup = app.deduplication
        self._window = app.windowing
        self._name = name
        self._state = state

    def prepare(self, outcome: Outcome, waiting: Sequence[Waiting]) -> Leave:
        """Decide what leaves; nothing of it may be in a sink before this returns."""
        leave = Leave(outcome=outcome, settled=[document.key for document in outcome.documents])
        if self._dedup is None and self._window is None:
            return leave
        are_read = frozenset(item.key for item in waiting if item.is_read)
        documents = outcome.documents
        if self._dedup is not None:
            documents = self._differing(leave, documents, are_read)
        if self._window is not None:
            documents = self._windowed(leave, documents, are_read, waiting)
        leave.outcome = replace(outcome, documents=documents)
        return leave

    def settle(self, leave: Leave) -> None:
        """Remember what left; inside `settling`, after every sink has flushed."""
        if leave.hashes:
            self._state.sent.remember(leave.hashes)
        if leave.places and self._state.windows is not None:
            self._state.windows.settle(leave.places)

    def _differing(self, leave: Leave, documents: Sequence[Document], are_read: frozenset[Key]) -> list[Document]:
        assert self._dedup is not None  # noqa: S101 - told by the caller
        sent = self._state.sent
        leave.hashes = sent.split(self._dedup, documents)
        # A dump's read is let through: it is how a repair is asked for.
        going = [each for each in documents if each.key in leave.hashes or each.key in are_read]
        keys = [each.key for each in going]
        if sent.are_known(keys):
            with self._state.folding():
                sent.forget(keys)
        held_back = len(documents) - len(going)
        metrics.count_step(self._name, self._dedup.name, taken=len(documents), out=len(going), same=held_back)
        return going

    def _windowed(
        self, leave: Leave, documents: Sequence[Document], are_read: frozenset[Key], waiting: Sequence[Waiting]
    ) -> list[Document]:
        windows = self._state.windows
        assert windows is not None and self._window is not None  # noqa: S101, PT018 - told by the caller
        with self._state.settling():
            counted = windows.count(documents, are_read=are_read)
        attempts = {item.key: item.attempts + 1 for item in waiting}
        leave.outcome.setbacks += [
            Setback(
                key=key,
                step=self._window.name,
                error=f"{fault} ({self._window.place})",
                attempts=attempts[key],
                next_try=None,
            )
            for key, fault in counted.faults.items()
        ]
        leave.settled = [key for key in leave.settled if key not in counted.faults]
        made, leave.places = windows.documents()
        metrics.count_step(self._name, self._window.name, taken=len(documents), out=len(made), late=counted.late)
        return made
