"""What a sink was given and has not delivered yet, and who decides what is stale.

write ──► Pending ──► flush: deliver ──► taken        delivered or refused: forgotten
             ▲                 └────► raised          kept: the next flush tries it again
             └──────────────────────────┘
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document, Refusal


class Delivery(Protocol):
    """Brings documents into a sink, one call at a time; the half of a sink that talks to its server."""

    def deliver(self, documents: Sequence[Document], *, up_to: Lsn) -> Sequence[Refusal]:
        """Make documents, the newest of each key, durable and visible; older ones than stored are ignored.

        Raises:
            RetryableError: not there now; whatever part was taken may be delivered again.
        """

    def close(self) -> None:
        """Release what it holds; a second call does nothing."""


class PendingSink:
    """A `Sink` that keeps the newest document of each key until the flush. Serves one thread."""

    def __init__(self, name: str, delivery: Delivery) -> None:
        self.name = name
        self._delivery = delivery
        self._pending: dict[Any, Document] = {}

    def write(self, documents: Sequence[Document]) -> None:
        """See `Sink.write`; nothing leaves before the flush."""
        for document in documents:
            waiting = self._pending.get(document.key)
            if waiting is None or waiting.version <= document.version:
                self._pending[document.key] = document

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """See `Sink.flush`."""
        # In the order of their changes, so that whoever watches the sink sees them as they happened.
        documents = sorted(self._pending.values(), key=lambda document: document.version)
        refusals = self._delivery.deliver(documents, up_to=up_to)
        self._pending.clear()
        return refusals

    def close(self) -> None:
        """See `Sink.close`."""
        self._delivery.close()


def not_stale(documents: Iterable[Document], stored: Mapping[Any, Version]) -> list[Document]:
    """The documents that are not older than what is stored under their keys."""
    return [
        document
        for document in documents
        if (version := stored.get(document.key)) is None or version <= document.version
    ]
