"""Recent documents over tantivy's index: what a reader sees of both is one state.

A recent document hides the committed one of its key, whether that is older or the same. For a search the recent ones
are indexed in memory, once somebody searches; looking up keys needs no index.
"""

import threading
from collections.abc import Mapping

import tantivy
from tantivy import Occur, Query

from deltaworks.store.search.entry import entry_of
from deltaworks.store.search.layout import index_schema, memory_index
from deltaworks.store.search.recent import Recent
from deltaworks.store.search.spec import SearchIndex
from deltaworks.store.search.terms import FIELD, key_term

_HEAP_BYTES = 15_000_000
"""The least that tantivy takes."""


class Overlay:
    """The recent documents as of one flush, `before` it those of an earlier one. Thread-safe."""

    def __init__(self, spec: SearchIndex, documents: Mapping[str, Recent], *, before: "Overlay | None") -> None:
        self.documents = documents
        self.alive_count = sum(document.body is not None for document in documents.values())
        self._spec = spec
        self._lock = threading.Lock()
        self._searcher: tantivy.Searcher | None = None
        self._entries: Mapping[str, tuple[Recent, tantivy.Document]] = before._entries if before is not None else {}
        """What was made for the last search; most of it serves the next one."""
        self._keys: Query | None = None

    def without_hidden(self, query: Query) -> Query:
        """The query, for tantivy's index, without the documents that are hidden there."""
        if not self.documents:
            return query
        if self._keys is None:
            self._keys = Query.term_set_query(index_schema(), FIELD, [key_term(key) for key in self.documents])
        return Query.boolean_query([(Occur.Must, query), (Occur.MustNot, self._keys)])

    def searcher(self) -> tantivy.Searcher | None:
        """A searcher of the recent documents that are there; `None` where none is."""
        with self._lock:
            if self._searcher is None and self.alive_count:
                self._searcher = self._indexed()
            return self._searcher

    def _indexed(self) -> tantivy.Searcher:
        index = memory_index()
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        entries: dict[str, tuple[Recent, tantivy.Document]] = {}
        for key, document in self.documents.items():
            if document.body is not None:
                made = self._entries.get(key)
                if made is None or made[0] is not document:
                    made = document, entry_of(self._spec, document)
                entries[key] = made
                writer.add_document(made[1])
        self._entries = entries
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        return index.searcher()
