"""Documents as columns: what a vectorised app hands to the sinks that take them so."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentBatch:
    """Documents as columns, at most one per key.

    `meta` (`_key`, `_commit`, `_ordinal`, `_committed_at`) and `bodies` have the same rows; `gone` has the
    meta of keys that are gone or filtered out.
    """

    meta: pa.Table
    bodies: pa.Table
    gone: pa.Table

    def __len__(self) -> int:
        return int(self.meta.num_rows + self.gone.num_rows)

    def documents(self) -> list[Document]:
        """The same as documents one by one."""
        return [
            *_documents(self.meta, self.bodies.to_pylist()),
            *_documents(self.gone, [None] * self.gone.num_rows),
        ]


@runtime_checkable
class BatchSink(Protocol):
    """A sink that takes columns as well, and says so as `Capabilities.is_columnar`."""

    def write_batch(self, batch: DocumentBatch) -> None:
        """As `Sink.write` of the batch's documents."""


def _documents(meta: pa.Table, bodies: Sequence[Mapping[str, Any] | None]) -> Iterator[Document]:
    for key, commit, ordinal, committed_at, body in zip(*(column.to_pylist() for column in meta), bodies, strict=True):
        yield Document(key=key, version=Version(Lsn(commit), ordinal), committed_at=committed_at, body=body)
