"""The contract of a sink: where an app's documents leave.

    spec.open ──► write … write ──► flush ──► refusals        one writer
    spec.open_reader ──► versions, documents                  anyone, at any time, where the sink can

Delivery is at least once, and a write that is older than what the sink holds is refused by its
version. Together they mean: per key the sink ends at the newest document and never goes back. What a
sink cannot promise it says in its `Capabilities`, which are asked instead of its kind.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, cast, runtime_checkable

import msgspec

from deltaworks.config import Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.position import Lsn, Version


# One is made for every change, in a seventh of the time that a dataclass takes; nobody changes one.
class Document(msgspec.Struct, gc=False):
    """One entity as an app leaves it; `body` is `None` where the entity is gone or filtered out.

    `version` is that of the newest change that went into it; `committed_at` that change's commit time.
    """

    key: Any
    version: Version
    committed_at: datetime
    body: Mapping[str, Any] | None

    def __repr__(self) -> str:
        # Bodies are nobody's business in a log.
        kind = "gone" if self.body is None else "there"
        return f"Document(key={self.key!r}, version={self.version!r}, committed_at={self.committed_at!r}, {kind})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a sink can do beyond taking documents; ask these, never what kind of sink it is."""

    is_versioned: bool = False
    """It refuses a write that is older than what it holds, whoever sends it and however late it arrives."""
    keeps_tombstones: bool = False
    """It keeps the version of a deleted document for ever, so that no late write brings it back."""
    is_transactional: bool = False
    """Readers see all of a flush or nothing of it."""
    is_columnar: bool = False
    """It takes whole Arrow batches."""
    can_read_back: bool = False
    """Its spec has `open_reader`: keys with versions, and documents."""
    is_event: bool = False
    """Each document that was sent counts; none replaces an earlier one."""
    may_forget: bool = False
    """Entries end by themselves or with the server, so a missing one is no fault."""
    is_in_home: bool = False
    """What it keeps is below `home` and in the lake alone, so with another home and lake it is another sink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A document that the sink will never take as it is: `reason` says why, without any of its data."""

    key: Any
    version: Version
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """What a sink holds of a key, the key as `key_text` gives it."""

    key: str
    version: Version
    is_deleted: bool = False


class SinkAwayError(RetryableError):
    """The sink is not there now or asks to wait; the same documents are tried again."""

    def __init__(self, message: str, *, after_s: float | None = None) -> None:
        """`after_s` is how long the sink asked to be left alone, if it did."""
        super().__init__(message)
        self.after_s = after_s


class NotReadableError(TerminalError):
    """The sink cannot be read back."""


class Sink(Protocol):
    """Takes documents; one instance serves one writer and one thread.

    A late write never brings a deleted document back: a sink keeps the version of what it deleted.
    """

    @property
    def name(self) -> str:
        """The name it was declared with."""

    def write(self, documents: Sequence[Document]) -> None:
        """Take documents, at most one per key; a smaller version than the stored one is ignored, an
        equal one is written again.

        Raises:
            RetryableError: the sink is not there now; nothing of this call counts as written.
        """

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """Make every earlier write durable and visible to readers; `up_to` is the source position reached.

        Gives the documents since the last flush that the sink will never take, each by name; all others are in.

        Raises:
            RetryableError: the sink is not there now; nothing since the last flush counts as written. It may be
                written again, and the next flush tries what was written before too.
        """

    def close(self) -> None:
        """Release what the sink holds; unflushed writes may be lost and will come again. A second call does nothing."""


class SinkReader(Protocol):
    """Reads a sink back while it is written by another; what was flushed before it was opened is seen."""

    def versions(self) -> Iterator[StoredVersion]:
        """Every key once, in any order, tombstones included where they are kept; streams, whatever the size."""

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """The bodies under these keys (`key_text`) in the sink's own types; a missing or deleted one is left out."""

    def close(self) -> None:
        """Release what the reader holds; a second call does nothing."""


class SinkSpec(Protocol):
    """A sink as an app declares it, e.g. `SearchIndex("movies", …)`: names and options, no connections."""

    @property
    def name(self) -> str:
        """The name of what it writes to; unlike that of another sink of its kind in the app."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, known without connecting."""

    def open(self, *, app: str, key: str, config: Config) -> Sink:
        """Connect. `app` and `key` are the app's name and its key column.

        Raises:
            RetryableError: the server is not there now.
            TerminalError: another writer has it, or what is there cannot take these documents.
        """


@runtime_checkable
class BesideSpec(Protocol):
    """A spec whose sinks of one kind in one app share what can be taken once only, such as a log's writer."""

    def open_beside(self, first: Sink, *, key: str) -> Sink:
        """Open with what the app's `first` sink of this kind has taken; it is let go with the last of them.

        A flush of one of them may make durable what was written to the others too.

        Raises:
            TerminalError: they cannot share it.
        """


class ReadableSpec(SinkSpec, Protocol):
    """A spec whose sink `can_read_back`."""

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:
        """Connect for reading; takes nothing from the writer."""


def open_reader(spec: SinkSpec, *, app: str, key: str, config: Config) -> SinkReader:
    """Open a sink for reading back.

    Raises:
        NotReadableError: it cannot; ask `spec.capabilities.can_read_back` before.
        RetryableError: the server is not there now.
    """
    if not spec.capabilities.can_read_back:
        raise NotReadableError(
            f"cannot read back sink {spec.name!r} of app {app!r}: a {type(spec).__name__} gives back nothing of what "
            "it was sent; verify another sink of the app"
        )
    return cast(ReadableSpec, spec).open_reader(app=app, key=key, config=config)


def key_text(key: Any) -> str:  # Any: a key is what the app's key column holds
    """A key as sinks without key types hold it: text as it is, everything else as JSON.

    >>> key_text("tt0078748"), key_text(7)
    ('tt0078748', '7')
    """
    if isinstance(key, str):
        return key
    # Most keys are whole numbers, and a sink asks several times for each document.
    return str(key) if type(key) is int else json.dumps(key, default=str, separators=(",", ":"))
