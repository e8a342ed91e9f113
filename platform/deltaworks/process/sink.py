"""The contract of a sink: where an app's documents leave.

Delivery is at least once, and a write that is older than what the sink holds is refused by its
version. Together they mean: per key the sink ends at the newest document and never goes back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from deltaworks.config import Config
from deltaworks.position import Lsn, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One entity as an app leaves it; `body` is `None` where the entity is gone or filtered out.

    `version` is that of the newest change that went into it; `committed_at` that change's commit time.
    """

    key: Any
    version: Version
    committed_at: datetime
    body: Mapping[str, Any] | None = field(repr=False)


class Sink(Protocol):
    """Takes documents; one instance serves one writer.

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

    def flush(self, *, up_to: Lsn) -> None:
        """Make every earlier write durable and visible to readers; `up_to` is the source position reached."""

    def close(self) -> None:
        """Release what the sink holds; unflushed writes may be lost and will come again."""


class SinkSpec(Protocol):
    """A sink as an app declares it, e.g. `SearchIndex("movies", …)`: names and options, no connections."""

    @property
    def name(self) -> str:
        """The name of what it writes to; unlike that of another sink of its kind in the app."""

    def open(self, *, app: str, key: str, config: Config) -> Sink:
        """Connect. `app` and `key` are the app's name and its key column.

        Raises:
            TerminalError: another writer has it, or what is there cannot take these documents.
        """
