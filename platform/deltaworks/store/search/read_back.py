"""The index read back whole: every key with its version, and the documents, as of one flush."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tantivy
from tantivy import Query

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import StoredVersion
from deltaworks.store.search.layout import TANTIVY_FILE, open_index, read_spec
from deltaworks.store.search.query import exactly
from deltaworks.store.search.recent import Recent, RecentFiles
from deltaworks.store.search.terms import key_term

_PAGE = 50_000
"""Keys read at once: a few megabytes of them."""


class SearchBackReader:
    """A `SinkReader` of the index in a folder; an index that is not there yet is empty. Serves one thread.

    Raises:
        IndexLayoutError: the index is of another version of Deltaworks.
    """

    def __init__(self, folder: Path) -> None:
        self._searcher: tantivy.Searcher | None = None
        self._recent: Mapping[str, Recent] = {}
        if (folder / TANTIVY_FILE).exists():
            read_spec(folder)
            # Before tantivy's index: that has whatever is recent no more.
            _, self._recent = RecentFiles(folder).read()
            self._index = open_index(folder)
            self._searcher = self._index.searcher()

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        for key, document in self._recent.items():
            yield StoredVersion(key=key, version=document.version, is_deleted=document.body is None)
        offset = 0
        while self._searcher is not None:
            found = self._searcher.search(Query.all_query(), limit=_PAGE, offset=offset, count=False)
            for _, address in found.hits:
                entry = self._searcher.doc(address)
                key = bytes(entry.get_first("key") or b"").decode()
                if key not in self._recent:
                    is_deleted = entry.get_first("body") is None
                    yield StoredVersion(key=key, version=_version(entry), is_deleted=is_deleted)
            if len(found.hits) < _PAGE:
                return
            offset += _PAGE

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        found = {}
        for key in keys:
            body = self._body(key)
            if body is not None:
                found[key] = json.loads(body)
        return found

    def close(self) -> None:
        """Let go of the index."""
        self._searcher = None
        self._recent = {}

    def _body(self, key: str) -> bytes | None:
        if (recent := self._recent.get(key)) is not None:
            return recent.body
        if self._searcher is None:
            return None
        query = exactly(self._index.schema, key_term(key))
        for _, address in self._searcher.search(query, limit=1, count=False).hits:
            body: bytes | None = self._searcher.doc(address).get_first("body")
            return body
        return None


def _version(entry: tantivy.Document) -> Version:
    return Version(Lsn(int(entry.get_first("position") or 0)), int(entry.get_first("ordinal") or 0))
