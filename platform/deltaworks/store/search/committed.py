"""tantivy's own index in the folder, and its one writer.

The version of every key, of deleted ones too, is in the index itself and committed with the documents.
"""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import tantivy

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn, Version
from deltaworks.store.search.entry import entry_of
from deltaworks.store.search.layout import TANTIVY_FILE, create_index, index_schema
from deltaworks.store.search.query import exactly
from deltaworks.store.search.recent import Recent
from deltaworks.store.search.spec import SearchIndex
from deltaworks.store.search.terms import FIELD, key_term

_HEAP_BYTES = 32 * 1024 * 1024
"""Per writer; tantivy's least is 15 MB. A batch of 500 documents fills a fraction of it."""

_DOCUMENTS_PER_BREATH = 10
_BREATH_S = 0.001


class IndexHeldError(TerminalError):
    """Another writer has the index."""


class IndexWriteError(TerminalError):
    """The index did not take what was written since the last flush; the app restarts from its checkpoint."""


class CommittedIndex:
    """The index as of tantivy's last commit. One thread at a time may `take`; others may ask for versions meanwhile."""

    def __init__(self, folder: Path, spec: SearchIndex, index: tantivy.Index, writer: tantivy.IndexWriter) -> None:
        self.commit = _opstamp(folder)
        """Tells the newest commit from every other."""
        self._folder = folder
        self._spec = spec
        self._index = index
        self._schema = index_schema()
        self._writer = writer
        self._searcher = index.searcher()

    @classmethod
    def open(cls, folder: Path, spec: SearchIndex) -> Self:
        """Take the index in the folder, made there if it is not.

        Raises:
            IndexHeldError: another writer has it.
        """
        index = create_index(folder)
        try:
            # One thread makes one segment per commit, hence few files to sync and to merge.
            writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        except ValueError as error:
            if "LockBusy" not in str(error):
                raise
            raise IndexHeldError(
                f"cannot write the search index {str(folder)!r}: another writer holds it; stop that one "
                "first (an app has one search index)"
            ) from error
        return cls(folder, spec, index, writer)

    def take(self, documents: Collection[Recent], *, is_awaited: bool) -> None:
        """Commit the newest documents of some keys; synced by tantivy.

        Raises:
            IndexWriteError: the commit failed, and this writer may not be used any more.
        """
        with committing(self._folder):
            for number, document in enumerate(documents, 1):
                self._writer.delete_documents_by_term(FIELD, key_term(document.key))
                self._writer.add_document(entry_of(self._spec, document))
                if not is_awaited and number % _DOCUMENTS_PER_BREATH == 0:
                    # Whoever makes the next documents has the interpreter first.
                    time.sleep(_BREATH_S)
            faults.reach("search.before_commit")
            self._writer.commit()
        faults.reach("search.after_commit")
        self._index.reload()
        self._searcher, self.commit = self._index.searcher(), _opstamp(self._folder)

    def versions(self, keys: Sequence[str]) -> dict[str, Version]:
        """The version of each of these keys that the index has."""
        searcher = self._searcher
        found: dict[str, tantivy.DocAddress] = {}
        for key in keys:
            for _, address in searcher.search(exactly(self._schema, key_term(key)), limit=1, count=False).hits:
                found[key] = address
        addresses = list(found.values())
        positions = searcher.fast_field_values("position", addresses)
        ordinals = searcher.fast_field_values("ordinal", addresses)
        return {
            key: Version(Lsn(int(position or 0)), int(ordinal or 0))
            for key, position, ordinal in zip(found, positions, ordinals, strict=True)
        }

    def close(self, *, has_failed: bool) -> None:
        """Let another writer in; what was not committed is dropped."""
        if not has_failed:
            self._writer.rollback()
        # Merges that run now hold the lock, so the index is free only when they have ended.
        self._writer.wait_merging_threads()


@contextmanager
def committing(folder: Path) -> Iterator[None]:
    """What fails inside is an `IndexWriteError` that tells of the folder."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise IndexWriteError(
            f"cannot commit the search index {str(folder)!r}: {error}; check the disk, then start the "
            "app again: it goes on from its checkpoint"
        ) from error


def _opstamp(folder: Path) -> int:
    """How many operations tantivy had taken at its last commit."""
    return int(json.loads((folder / TANTIVY_FILE).read_bytes())["opstamp"])
