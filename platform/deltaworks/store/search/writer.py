"""The sink: documents into a tantivy index, addressed by key and external version.

The version of every key, of deleted ones too, is in the index itself and committed with the
documents. So a crash leaves one state, the last commit, and a late write is refused by it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import tantivy

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError, document_json
from deltaworks.process.sink import Document, Refusal, key_text
from deltaworks.store.search.layout import (
    SPEC_FILE,
    TANTIVY_FILE,
    FreshnessRecord,
    create_index,
    index_schema,
    replace_text,
)
from deltaworks.store.search.spec import LAYOUT, SearchIndex, values_at
from deltaworks.store.search.words import whole_of, words_of

_HEAP_BYTES = 32 * 1024 * 1024
"""Per writer; tantivy's least is 15 MB. A batch of 500 documents fills a fraction of it."""

_BALLAST = 17_000
"""Empty documents that an index begins with; no query finds them.

tantivy merges segments of one size class whenever there are eight, and its smallest class reaches to about 16,800
documents. So a small index would be written anew every eight commits, and one commit costs as much as all of its
documents. A segment above that class keeps the large segments in a class of their own.
"""

_KEY_BYTES = 32_000
"""tantivy drops terms of more than 65,530 bytes without a word."""


class IndexHeldError(TerminalError):
    """Another writer has the index."""


class IndexLayoutError(TerminalError):
    """The index was built for another declaration, or by something else; it has to be rebuilt."""


class IndexWriteError(TerminalError):
    """The index did not take what was written since the last flush; the app restarts from its checkpoint."""


class SearchWriter:
    """The one writer of an index; made by `SearchIndex.open`. Serves one thread."""

    def __init__(self, folder: Path, spec: SearchIndex, index: tantivy.Index, writer: tantivy.IndexWriter) -> None:
        self.name = spec.name
        self._folder = folder
        self._spec = spec
        self._index = index
        self._schema = index_schema(spec)
        self._writer: tantivy.IndexWriter | None = writer
        self._searcher = index.searcher()
        self._has_failed = False
        self._pending: dict[str, Version] = {}
        self._refusals: dict[str, Refusal] = {}
        self._freshness = FreshnessRecord.load(folder) or FreshnessRecord(flushed_at=datetime.now(UTC))
        self._newest = self._freshness.committed_at

    @classmethod
    def open(cls, folder: Path, spec: SearchIndex) -> Self:
        """See `SearchIndex.open`."""
        folder.mkdir(parents=True, exist_ok=True)
        _check_layout(folder, spec)
        index = create_index(folder, spec)
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
        if not index.searcher().num_docs:
            with _committing(folder):
                for _ in range(_BALLAST):
                    writer.add_document(tantivy.Document())
                writer.commit()
            index.reload()
        # Boosts and display may change without a rebuild; the newest declaration counts.
        replace_text(folder / SPEC_FILE, spec.to_json())
        return cls(folder, spec, index, writer)

    def write(self, documents: Sequence[Document]) -> None:
        """See `Sink.write`. Nothing is durable or visible before `flush`."""
        writer = self._open_writer()
        stored = self._stored_versions([key_text(document.key) for document in documents])
        for document, version in zip(documents, stored, strict=True):
            if not _is_stale(document, version):
                self._take(writer, document)

    def _take(self, writer: tantivy.IndexWriter, document: Document) -> None:
        key = key_text(document.key)
        try:
            entry = self._entry(document)
        except UnsupportedBodyError as error:
            self._refusals[key] = Refusal(key=document.key, version=document.version, reason=str(error))
            return
        writer.delete_documents_by_term("key", key)
        writer.add_document(entry)
        self._pending[key] = document.version
        self._refusals.pop(key, None)
        if self._newest is None or document.committed_at > self._newest:
            self._newest = document.committed_at

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """See `Sink.flush`: one commit, synced by tantivy; without new documents only the record moves.

        Raises:
            IndexWriteError: the commit failed; what was written since the last flush is gone.
        """
        writer = self._open_writer()
        if self._pending:
            try:
                with _committing(self._folder):
                    faults.reach("search.before_commit")
                    writer.commit()
            except IndexWriteError:
                # Documents since the last commit may be lost: a later flush of this writer must not claim them.
                self._has_failed = True
                raise
            faults.reach("search.after_commit")
            self._index.reload()
            self._searcher = self._index.searcher()
            self._pending.clear()
        # A replay flushes older positions; what was in the index then is in it still.
        self._freshness = FreshnessRecord(
            position=max(up_to, self._freshness.position), committed_at=self._newest, flushed_at=datetime.now(UTC)
        )
        self._freshness.save(self._folder)
        refusals = list(self._refusals.values())
        self._refusals.clear()
        return refusals

    def close(self) -> None:
        """Let another writer in; what was not flushed is dropped. A second call does nothing."""
        if self._writer is not None:
            if not self._has_failed:
                self._writer.rollback()
            # Merges that run now hold the lock, so the index is free only when they have ended.
            self._writer.wait_merging_threads()
            self._writer = None

    def _open_writer(self) -> tantivy.IndexWriter:
        if self._writer is None or self._has_failed:
            state = "failed" if self._has_failed else "was closed"
            raise IndexWriteError(
                f"cannot write the search index {str(self._folder)!r}: this writer {state}; open it again"
            )
        return self._writer

    def _stored_versions(self, keys: Sequence[str]) -> list[Version | None]:
        """The version of each key as of the last write, flushed or not."""
        found: dict[str, tantivy.DocAddress] = {}
        for key in keys:
            if key not in self._pending:
                query = tantivy.Query.term_query(self._schema, "key", key, index_option="basic")
                for _, address in self._searcher.search(query, limit=1, count=False).hits:
                    found[key] = address
        addresses = list(found.values())
        positions = self._searcher.fast_field_values("position", addresses)
        ordinals = self._searcher.fast_field_values("ordinal", addresses)
        versions = {
            key: Version(Lsn(int(position or 0)), int(ordinal or 0))
            for key, position, ordinal in zip(found, positions, ordinals, strict=True)
        } | self._pending
        return [versions.get(key) for key in keys]

    def _entry(self, document: Document) -> tantivy.Document:
        if len(key_text(document.key).encode()) > _KEY_BYTES:
            raise UnsupportedBodyError(f"a key has more than {_KEY_BYTES} bytes; choose a shorter one in the app")
        entry = tantivy.Document()
        entry.add_text("key", key_text(document.key))
        entry.add_unsigned("position", document.version.position.value)
        entry.add_unsigned("ordinal", document.version.ordinal)
        entry.add_boolean("is_deleted", document.body is None)
        entry.add_float("popularity", _damped(document.body, self._spec.popularity))
        if document.body is not None:
            entry.add_bytes("body", document_json(document.body))
            for number, path in enumerate(self._spec.text):
                terms = [_terms(str(value)) for value in values_at(document.body, path)]
                # Without positions and frequencies, the words of all values are as good as one text.
                entry.add_text(f"text_{number}", " ".join(words for words, _ in terms))
                for _, whole in terms:
                    entry.add_text(f"whole_{number}", whole)
        return entry


@contextmanager
def _committing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise IndexWriteError(
            f"cannot commit the search index {str(folder)!r}: {error}; check the disk, then start the "
            "app again: it goes on from its checkpoint"
        ) from error


@lru_cache(maxsize=50_000)
def _terms(text: str) -> tuple[str, str]:
    """A text's words, and the text as the one term of a whole value."""
    # Names come again and again; reading one from here is ten times cheaper than analysing it.
    words = words_of(text)
    return " ".join(words), whole_of(words)


def _is_stale(document: Document, stored: Version | None) -> bool:
    return stored is not None and document.version < stored


def _check_layout(folder: Path, spec: SearchIndex) -> None:
    rebuild = (
        f"to rebuild it, stop the app, remove {str(folder)!r} and the app's checkpoint, and start the app: "
        "it replays the log"
    )
    try:
        layout = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / TANTIVY_FILE).exists():
            raise IndexLayoutError(
                f"cannot use the search index {str(folder)!r}: it has no {SPEC_FILE!r}; {rebuild}"
            ) from error
        # Written before the index: an index without it is never one of ours that crashed half made.
        replace_text(folder / SPEC_FILE, spec.to_json())
        return
    except json.JSONDecodeError as error:
        raise IndexLayoutError(f"cannot read {str(folder / SPEC_FILE)!r}; {rebuild}") from error
    built = (layout.get("layout"), list(layout.get("text", ())), layout.get("popularity"))
    wanted = (LAYOUT, list(spec.text), spec.popularity)
    if built != wanted:
        raise IndexLayoutError(
            f"cannot use the search index {str(folder)!r}: it was built for (layout, text, popularity) {built!r} and "
            f"the app declares {wanted!r}; {rebuild}"
        )


def _damped(body: Mapping[str, Any] | None, path: str | None) -> float:
    """0 for nothing, 1.5 for a thousand, 3 for a million: the search multiplies a score by log2(2 + this)."""
    values = values_at(body, path) if path else []
    count = next((float(value) for value in values if isinstance(value, (int, float, Decimal))), 0.0)
    return math.log10(1 + count) / 2 if 0 < count < math.inf else 0.0
