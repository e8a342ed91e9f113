"""Where an OpenSearch sink keeps its documents, and how it moves without downtime.

    alias movies ──(hides tombstones)──► index movies-000001 ── mapping of the declared type
                 └── after a rebuild ──► index movies-000002

A mapping that only grew is changed in place. One that cannot be is rebuilt when the app starts: the old index
is closed to writers, copied with its versions and tombstones, the alias swapped in one step, the old one
removed at the next start.
Readers of the alias see one or the other, whole. A rebuild that dies starts again at the next start.
"""

import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.process.shape import fields_of, is_record

META = "_deltaworks"
"""The field of every document with its version: `position`, `ordinal`, `is_deleted`, `committed_at`."""
PAGE = 1_000
_SCROLL = "5m"
_META_MAPPING = {
    "properties": {
        "position": {"type": "long"},
        "ordinal": {"type": "long"},
        "is_deleted": {"type": "boolean"},
        "committed_at": {"type": "date"},
    }
}
_ALIVE = {"bool": {"must_not": {"term": {f"{META}.is_deleted": True}}}}
_TEXT = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}
_TYPES: Mapping[Any, Mapping[str, Any]] = {
    int: {"type": "long"},
    float: {"type": "double"},
    Decimal: {"type": "double"},
    str: _TEXT,
    bool: {"type": "boolean"},
    bytes: {"type": "binary"},
    date: {"type": "date"},
    datetime: {"type": "date"},
}


class OpenSearchLayoutError(TerminalError):
    """The index cannot be what the app declares; the message says what stands in the way."""


def mapping_of(schema: type | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of documents of this type; without a type the server guesses from the first document.

    >>> mapping_of(None, {"title": {"type": "keyword"}})["properties"]["title"]
    {'type': 'keyword'}
    """
    declared = {} if schema is None else _properties(schema)
    # A field that is not declared is a surprise, and surprises are told, not indexed.
    dynamic = True if schema is None else "strict"
    return {"dynamic": dynamic, "properties": {**declared, **overrides, META: _META_MAPPING}}


def _properties(schema: type) -> dict[str, Any]:
    return {field.name: _property(field.type) for field in fields_of(schema)}


def _property(declared: Any) -> Mapping[str, Any]:
    if typing.get_origin(declared) is list:
        # Every field may hold many values; there is no type for it.
        return _property(typing.get_args(declared)[0])
    if typing.get_origin(declared) is typing.Literal:
        return {"type": "keyword"} if isinstance(typing.get_args(declared)[0], str) else {"type": "long"}
    if is_record(declared):
        return {"properties": _properties(declared)}
    return _TYPES.get(declared, {"type": "object", "enabled": False})


class Layout:
    """The index behind one alias; `prepare` makes it what the app declares."""

    def __init__(self, client: Any, alias: str, *, mapping: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self._client = client
        self._alias = alias
        self._settings = settings
        text = json.dumps([mapping, settings], sort_keys=True)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._mapping = {**mapping, "_meta": {"deltaworks": self._fingerprint}}

    def index(self) -> str | None:
        """The index behind the alias; `None` before the first one."""
        from opensearchpy.exceptions import NotFoundError  # noqa: PLC0415

        try:
            found = self._client.indices.get_alias(name=self._alias)
        except NotFoundError:
            return None
        if len(found) > 1:
            raise OpenSearchLayoutError(
                f"alias {self._alias!r} stands for {len(found)} indices, {', '.join(sorted(found))}; leave it one"
            )
        return str(next(iter(found)))

    def prepare(self) -> None:
        """Create, extend or rebuild the index, whatever it takes.

        Raises:
            OpenSearchLayoutError: the name is taken by an index of something else, or documents do not fit.
        """
        index = self.index()
        if index is None:
            self._create_first()
            return
        if self._made_for(index) != self._fingerprint and not self._extend(index):
            self._rebuild(index)
            return
        # A rebuild that died may have left the block, or the index it came from.
        self._block_writes(index, is_blocked=False)
        self._remove_others(index)

    def _create_first(self) -> None:
        if self._client.indices.exists(index=self._alias):
            raise OpenSearchLayoutError(
                f"{self._alias!r} is an index, not an alias of ours; choose another name, or remove that index"
            )
        self._create(f"{self._alias}-000001", aliases={self._alias: {"filter": _ALIVE}})

    def _create(self, index: str, *, aliases: Mapping[str, Any]) -> None:
        body = {"settings": dict(self._settings), "mappings": self._mapping, "aliases": aliases}
        self._client.indices.create(index=index, body=body)

    def _made_for(self, index: str) -> str | None:
        mapping = self._client.indices.get_mapping(index=index)[index]["mappings"]
        made_for: str | None = mapping.get("_meta", {}).get("deltaworks")
        return made_for

    def _extend(self, index: str) -> bool:
        from opensearchpy.exceptions import RequestError  # noqa: PLC0415

        if self._settings and not self._has_settings(index):
            return False
        try:
            self._client.indices.put_mapping(index=index, body=self._mapping)
        except RequestError:
            return False
        return True

    def _has_settings(self, index: str) -> bool:
        found = self._client.indices.get_settings(index=index, flat_settings=True)[index]["settings"]
        return all(
            str(found.get(name if name.startswith("index.") else f"index.{name}")) == str(value)
            for name, value in _flat(self._settings)
        )

    def _rebuild(self, index: str) -> None:
        stem, _, number = index.rpartition("-")
        after = f"{stem}-{int(number) + 1:06}"
        # What a rebuild that died has left.
        self._client.indices.delete(index=after, ignore_unavailable=True)
        self._create(after, aliases={})
        self._block_writes(index, is_blocked=True)
        count = self._copy(index, after)
        faults.reach("opensearch.after_copy")
        if count:
            self._client.indices.delete(index=after)
            self._block_writes(index, is_blocked=False)
            raise OpenSearchLayoutError(
                f"cannot rebuild {self._alias!r}: {count} documents do not fit the new mapping; declare the fields "
                "as they are, or make the documents anew under another name"
            )
        actions = [
            {"remove": {"index": index, "alias": self._alias}},
            {"add": {"index": after, "alias": self._alias, "filter": _ALIVE}},
        ]
        self._client.indices.update_aliases(body={"actions": actions})
        faults.reach("opensearch.after_swap")
        # A search that found the old index behind the alias may run still; the next start removes it.

    def _copy(self, index: str, after: str) -> int:
        """Copy every document with its version; how many do not fit."""
        refused = 0
        for page in pages(self._client, index, source=True):
            lines: list[Any] = []
            for hit in page:
                position = hit["_source"][META]["position"]
                action = {"_id": hit["_id"], "version": position, "version_type": "external_gte"}
                lines += [{"index": action}, hit["_source"]]
            answer = self._client.bulk(index=after, body=lines)
            refused += sum(item["index"]["status"] >= 300 for item in answer["items"])
        self._client.indices.refresh(index=after)
        return refused

    def _remove_others(self, index: str) -> None:
        found = self._client.indices.get_alias(index=f"{self._alias}-*", expand_wildcards="open,closed")
        number = re.compile(re.escape(self._alias) + r"-\d{6}")
        others = [name for name in found if name != index and number.fullmatch(name) and not found[name]["aliases"]]
        if others:
            self._client.indices.delete(index=",".join(others))

    def _block_writes(self, index: str, *, is_blocked: bool) -> None:
        self._client.indices.put_settings(index=index, body={"index.blocks.write": True if is_blocked else None})


def pages(client: Any, index: str, *, source: bool | str) -> Iterator[list[Any]]:
    """Every document of an index as of now, a page at a time; `source` says how much of each."""
    body = {"size": PAGE, "sort": ["_doc"], "_source": source}
    answer = client.search(index=index, body=body, scroll=_SCROLL)
    try:
        while answer["hits"]["hits"]:
            yield answer["hits"]["hits"]
            answer = client.scroll(body={"scroll_id": answer["_scroll_id"], "scroll": _SCROLL})
    finally:
        client.clear_scroll(body={"scroll_id": [answer["_scroll_id"]]})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
