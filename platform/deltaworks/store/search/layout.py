"""The fields of the index and the files beside it.

    folder/ index.json      the declaration (`SearchIndex.to_json`); written before the index
            freshness.json  what the last commit reached; replaced after each commit
            …               tantivy's own files

| field                 | holds                                                                    |
|-----------------------|--------------------------------------------------------------------------|
| `key`                 | the document's key as text                                               |
| `position`, `ordinal` | its version; a tombstone has one too                                     |
| `is_deleted`          | whether this is a tombstone: a key that is gone; kept as long as the index |
| `popularity`          | damped, so that it orders equal matches and seldom beats a better one    |
| `body`                | the document as JSON, for display; none in a tombstone                   |
| `text_0`, `text_1`, … | the words at each path of `SearchIndex.text`                             |
| `whole_0`, …          | the same values, each as one term: for "is", and "begins with"           |

Some documents have no field at all: ballast, see `writer`.
"""

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import tantivy

from deltaworks.position import START, Lsn
from deltaworks.store.search.spec import SearchIndex
from deltaworks.store.search.words import TOKENIZER, analyzer

SPEC_FILE = "index.json"
FRESHNESS_FILE = "freshness.json"
TANTIVY_FILE = "meta.json"


def index_schema(spec: SearchIndex) -> tantivy.Schema:
    """The schema of the index of this declaration."""
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("key", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("position", stored=True, fast=True)
    builder.add_unsigned_field("ordinal", stored=True, fast=True)
    builder.add_boolean_field("is_deleted", indexed=True)
    builder.add_float_field("popularity", fast=True)
    builder.add_bytes_field("body", stored=True)
    for number in range(len(spec.text)):
        # Scores are constants and phrases are whole values, so no frequencies and no positions are kept.
        builder.add_text_field(f"text_{number}", tokenizer_name=TOKENIZER, index_option="basic")
        builder.add_text_field(f"whole_{number}", tokenizer_name="raw", index_option="basic")
    return builder.build()


def create_index(folder: Path, spec: SearchIndex) -> tantivy.Index:
    """The index in the folder, created there if it is not."""
    return _ready(tantivy.Index(index_schema(spec), str(folder)))


def open_index(folder: Path) -> tantivy.Index:
    """The index that is in the folder."""
    return _ready(tantivy.Index.open(str(folder)))


def _ready(index: tantivy.Index) -> tantivy.Index:
    index.register_tokenizer(TOKENIZER, analyzer())
    # Reloaded when the freshness record says so; a watcher thread would only be late.
    index.config_reader(reload_policy="manual")
    return index


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshnessRecord:
    """What the writer records after a commit; `committed_at` is that of the newest change in the index."""

    position: Lsn = START
    committed_at: datetime | None = None
    flushed_at: datetime

    def save(self, folder: Path) -> None:
        """Replace the record. Not synced: after a power cut an older one, or none, claims too little."""
        values = {
            "position": self.position.value,
            "committed_at": self.committed_at and self.committed_at.isoformat(),
            "flushed_at": self.flushed_at.isoformat(),
        }
        replace_text(folder / FRESHNESS_FILE, json.dumps(values))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The record, or `None` where nothing was flushed yet."""
        try:
            values = json.loads((folder / FRESHNESS_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None
        committed_at = values["committed_at"]
        return cls(
            position=Lsn(values["position"]),
            committed_at=committed_at and datetime.fromisoformat(committed_at),
            flushed_at=datetime.fromisoformat(values["flushed_at"]),
        )


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    # Rename is atomic only inside one folder, so the new text is written next to its final name.
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
