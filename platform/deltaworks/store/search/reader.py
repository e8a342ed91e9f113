"""The reading side: search, look up, and say how fresh the index is. Any number, in any process."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import nlargest
from pathlib import Path
from typing import Any

import orjson
import tantivy
from tantivy import Query

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import key_text
from deltaworks.store.search.layout import FRESHNESS_FILE, SPEC_FILE, FreshnessRecord, open_index, read_spec
from deltaworks.store.search.overlay import Overlay
from deltaworks.store.search.query import MAX_WORDS, build_query, exactly
from deltaworks.store.search.recent import Recent, RecentFiles
from deltaworks.store.search.spec import SearchIndex
from deltaworks.store.search.terms import THERE, key_term
from deltaworks.store.search.words import whole_of, words_of

_MAX_QUERY_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A document of the index; `key` is its key as text."""

    key: str
    version: Version
    body: Mapping[str, Any] = field(repr=False)
    score: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best hits of a query, and how many there are in all.

    `words` are the query's words as the index sees them; `is_close` says that no document had them
    all as typed, so these are documents with similar words.
    """

    hits: tuple[Hit, ...] = ()
    total: int = 0
    took_s: float = 0.0
    words: tuple[str, ...] = ()
    is_close: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """What the index holds: everything committed at or before `position`; `committed_at` is that of
    its newest change.
    """

    position: Lsn
    committed_at: datetime | None
    flushed_at: datetime
    document_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """The index as of one flush; replaced as a whole, so a search sees one state."""

    spec: SearchIndex
    index: tantivy.Index
    searcher: tantivy.Searcher
    overlay: Overlay
    record: FreshnessRecord
    freshness: Freshness
    spec_stamp: tuple[int, int]
    stamp: tuple[int, int]

    def search(self, query: Query, *, limit: int) -> tuple[list[Hit], int]:
        """The best hits, and how many there are in all. Scores are made of constants, so those of both compare."""
        found = [(self.searcher, self.overlay.without_hidden(query)), (self.overlay.searcher(), query)]
        hits: list[Hit] = []
        total = 0
        for searcher, asked in found:
            if searcher is not None:
                result = searcher.search(asked, limit=limit, weight_by_field="popularity")
                hits += [_hit(searcher, address, score) for score, address in result.hits]
                total += _count(result)
        return sorted(hits, key=lambda hit: -hit.score)[:limit], total

    def newest(self, limit: int) -> list[Hit]:
        """The documents that changed last."""
        alive = self.overlay.without_hidden(exactly(self.index.schema, THERE))
        found = self.searcher.search(alive, limit=limit, order_by_field="position", count=False)
        hits = [_hit(self.searcher, address, 0.0) for _, address in found.hits]
        recent = (document for document in self.overlay.documents.values() if document.body is not None)
        hits += [_recent_hit(document) for document in nlargest(limit, recent, key=lambda each: each.version)]
        return sorted(hits, key=lambda hit: hit.version, reverse=True)[:limit]

    def document(self, key: str) -> Hit | None:
        """The document of a key, unless it is gone."""
        document = self.overlay.documents.get(key)
        if document is not None:
            return None if document.body is None else _recent_hit(document)
        query = exactly(self.index.schema, key_term(key))
        for score, address in self.searcher.search(query, limit=1, count=False).hits:
            hit = _hit(self.searcher, address, score)
            return hit if hit.body else None
        return None


class SearchReader:
    """Reads the index in a folder; follows the writer's flushes. Thread-safe, opens on first use.

    An index that is not there yet is no error: searches find nothing and `freshness` is `None`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files = RecentFiles(folder)
        self._opened: _Opened | None = None

    def search(self, text: str, limit: int = 20) -> SearchResult:
        """The best hits for what somebody typed; any text is a query, none is an error."""
        started = time.perf_counter()
        words = tuple(words_of(text[:_MAX_QUERY_CHARS])[:MAX_WORDS])
        opened = self._current()
        if opened is None or not words or limit < 1:
            return SearchResult(words=words, took_s=time.perf_counter() - started)
        # Typos are looked for only when the words as typed lead nowhere: it is slower, and noise otherwise.
        for is_close in (False, True):
            query = build_query(
                opened.index.schema,
                words,
                boosts=tuple(opened.spec.text.values()),
                whole=whole_of(words),
                is_close=is_close,
            )
            hits, total = opened.search(query, limit=limit)
            if hits:
                break
        return SearchResult(
            hits=tuple(hits),
            total=total,
            took_s=time.perf_counter() - started,
            words=words,
            is_close=is_close and bool(hits),
        )

    def newest(self, limit: int = 10) -> list[Hit]:
        """The documents that changed last, by their version's position."""
        opened = self._current()
        if opened is None or limit < 1:
            return []
        return opened.newest(limit)

    def documents(self, keys: Sequence[Any]) -> list[Hit]:  # Any: a key is what the app's key column holds
        """The documents of these keys, in their order; those that are not there are left out."""
        opened = self._current()
        if opened is None:
            return []
        hits = (opened.document(key_text(key)) for key in keys)
        return [hit for hit in hits if hit is not None]

    def freshness(self) -> Freshness | None:
        """How fresh the index is; `None` before its first flush."""
        opened = self._current()
        return opened.freshness if opened else None

    def spec(self) -> SearchIndex | None:
        """The declaration that the index was last written with; `None` before its first flush."""
        opened = self._current()
        return opened.spec if opened else None

    def _current(self) -> _Opened | None:
        stamp, spec_stamp = _stamp(self.folder / FRESHNESS_FILE), _stamp(self.folder / SPEC_FILE)
        opened = self._opened
        if opened is not None and (opened.stamp, opened.spec_stamp) == (stamp, spec_stamp):
            return opened
        with self._lock:
            if stamp is None or spec_stamp is None:
                self._opened = None
            else:
                self._opened = self._reopened(self._opened, stamp, spec_stamp)
            return self._opened

    def _reopened(self, known: _Opened | None, stamp: tuple[int, int], spec_stamp: tuple[int, int]) -> _Opened | None:
        if known is not None and known.spec_stamp != spec_stamp:
            # The declaration was written anew: other boosts, or another index in the same place.
            known = None
        spec = known.spec if known is not None else read_spec(self.folder)
        index = known.index if known is not None else open_index(self.folder)
        searcher, commit = (known.searcher, known.record.commit) if known is not None else (None, None)
        # What is recent is read first: it goes only after tantivy's index has it.
        record, documents = self._files.read()
        while record is not None and commit != record.commit:
            index.reload()
            searcher, commit = index.searcher(), record.commit
            # A flush since then may be in tantivy's index, and is to be seen whole.
            record, documents = self._files.read()
        if record is None or searcher is None:
            return None
        overlay = Overlay(spec, documents, before=known.overlay if known is not None else None)
        alive = overlay.without_hidden(exactly(index.schema, THERE))
        return _Opened(
            spec=spec,
            index=index,
            searcher=searcher,
            overlay=overlay,
            record=record,
            freshness=Freshness(
                position=record.position,
                committed_at=record.committed_at,
                flushed_at=record.flushed_at,
                document_count=_count(searcher.search(alive, limit=1)) + overlay.alive_count,
            ),
            stamp=stamp,
            spec_stamp=spec_stamp,
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _recent_hit(document: Recent) -> Hit:
    return Hit(key=document.key, version=document.version, body=orjson.loads(document.body or b"{}"))


def _count(found: tantivy.SearchResult) -> int:
    return int(found.count)  # type: ignore[attr-defined]  # tantivy's stubs leave it out


def _hit(searcher: tantivy.Searcher, address: tantivy.DocAddress, score: float) -> Hit:
    entry = searcher.doc(address)
    body = entry.get_first("body")
    return Hit(
        key=bytes(entry.get_first("key") or b"").decode(),
        version=Version(Lsn(int(entry.get_first("position") or 0)), int(entry.get_first("ordinal") or 0)),
        body={} if body is None else orjson.loads(body),
        score=float(score),
    )
