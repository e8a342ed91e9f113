"""A sink in memory: the contract of `process/sink.py` to its full extent, for tests and for trying an app out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from deltaworks.config import Config
from deltaworks.position import START, Lsn
from deltaworks.process.sink import Capabilities, Document, Refusal, SinkAwayError, StoredVersion, key_text

_CAN = Capabilities(is_versioned=True, keeps_tombstones=True, is_transactional=True, can_read_back=True)

UNFIT = "\0unfit\0"
"""A value that a `MemorySink` refuses, as a database refuses one that its column cannot hold."""


class MemorySink:
    """A sink that keeps its documents as long as the object lives; both the declaration and what it holds.

    Open it as often as you like, also after a "crash": what was flushed is there. Thread-safe for readers.

    >>> films = MemorySink("films")
    >>> films.bodies
    {}
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.position: Lsn = START
        """The largest source position that a flush came with."""
        self.history: list[Document] = []
        """Every document that was taken, in the order of the flushes; stale ones were not."""
        self.refusals: dict[Any, str] = {}
        """Keys whose documents it refuses, each with the reason; change it at will."""
        self._held: dict[Any, Document] = {}
        self.asked = 0
        """How often it was asked while it was away."""
        self._away: SinkAwayError | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Everything that one process can promise."""
        return _CAN

    @property
    def bodies(self) -> dict[Any, Mapping[str, Any]]:
        """The flushed documents by key, without deleted ones."""
        return {key: document.body for key, document in self._held.items() if document.body is not None}

    @property
    def documents(self) -> dict[Any, Document]:
        """What is held of each key, tombstones too."""
        return dict(self._held)

    @contextmanager
    def away(self, *, after_s: float | None = None) -> Iterator[None]:
        """Be absent for the length of the block, or until `come_back`: every write and flush raises.

        `after_s` is how long it asks to be left alone.
        """
        self.asked = 0
        self._away = SinkAwayError(
            f"cannot write sink {self.name!r}: it is away, as the test asked for", after_s=after_s
        )
        try:
            yield
        finally:
            self._away = None

    def come_back(self) -> None:
        """Be there again; may be called from another thread."""
        self._away = None

    def open(self, *, app: str, key: str, config: Config) -> "MemorySinkWriter":  # noqa: ARG002
        """See `SinkSpec.open`."""
        return MemorySinkWriter(self)

    def open_reader(self, *, app: str, key: str, config: Config) -> "MemorySinkReader":  # noqa: ARG002
        """See `ReadableSpec.open_reader`."""
        return MemorySinkReader(self._held)

    def _check_here(self) -> None:
        if (away := self._away) is not None:
            self.asked += 1
            raise away

    def _take(self, documents: Sequence[Document]) -> list[Refusal]:
        held = dict(self._held)
        refusals = []
        for document in documents:
            reason = self.refusals.get(document.key)
            if reason is None and document.body is not None and UNFIT in document.body.values():
                reason = "it holds an UNFIT"
            if reason is not None:
                refusals.append(Refusal(key=document.key, version=document.version, reason=reason))
            elif document.key not in held or held[document.key].version <= document.version:
                held[document.key] = document
                self.history.append(document)
        # One assignment: a reader in another thread sees all of a flush or nothing of it.
        self._held = held
        return refusals


class MemorySinkWriter:
    """A writer of a `MemorySink`."""

    def __init__(self, sink: MemorySink) -> None:
        self.name = sink.name
        self._sink = sink
        self._pending: list[Document] = []

    def write(self, documents: Sequence[Document]) -> None:
        """See `Sink.write`."""
        self._sink._check_here()
        # A sink that keeps a reference would show changes that the app makes to its own objects later.
        self._pending += deepcopy(list(documents))

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """See `Sink.flush`."""
        self._sink._check_here()
        refusals = self._sink._take(self._pending)
        self._pending = []
        self._sink.position = max(self._sink.position, up_to)
        return refusals

    def close(self) -> None:
        """Forget what was not flushed."""
        self._pending = []


class MemorySinkReader:
    """What a `MemorySink` held when this was opened."""

    def __init__(self, held: Mapping[Any, Document]) -> None:
        self._held = {key_text(key): document for key, document in held.items()}

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        for key, document in self._held.items():
            yield StoredVersion(key=key, version=document.version, is_deleted=document.body is None)

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        return {
            key: document.body
            for key in keys
            if (document := self._held.get(key)) is not None and document.body is not None
        }

    def close(self) -> None:
        """Nothing is held."""
