"""The fields of the index and the files beside it.

    folder/ index.json      the declaration (`SearchIndex.to_json`); written before the index
            freshness.json  what the last flush reached, and what of `recent-…` counts; replaced after each flush
            recent-…        documents that tantivy does not have yet, see `recent`
            …               tantivy's own files

| field                 | holds                                                                      |
|-----------------------|----------------------------------------------------------------------------|
| `key`                 | the document's key as text, in UTF-8                                       |
| `position`, `ordinal` | its version; a tombstone has one too                                       |
| `popularity`          | damped, so that it orders equal matches and seldom beats a better one      |
| `body`                | the document as JSON, for display; none in a tombstone: a key that is gone, |
|                       | kept as long as the index                                                  |
| `terms`               | all that is looked for, see `terms`                                        |

Only `terms` is indexed: each indexed field has a dictionary of its own, which costs tantivy about a millisecond at
every commit and in every merge, however little is in it.
"""

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import tantivy

from deltaworks.errors import TerminalError
from deltaworks.position import START, Lsn
from deltaworks.store.search.spec import LAYOUT, SearchIndex
from deltaworks.store.search.terms import FIELD

SPEC_FILE = "index.json"
FRESHNESS_FILE = "freshness.json"
TANTIVY_FILE = "meta.json"


class IndexLayoutError(TerminalError):
    """The index was built for another declaration, or by something else; it has to be rebuilt."""


def index_schema() -> tantivy.Schema:
    """The schema of every index."""
    builder = tantivy.SchemaBuilder()
    builder.add_bytes_field("key", stored=True)
    builder.add_unsigned_field("position", stored=True, fast=True)
    builder.add_unsigned_field("ordinal", stored=True, fast=True)
    builder.add_float_field("popularity", fast=True)
    builder.add_bytes_field("body", stored=True)
    # Scores are constants and phrases are whole values, so no frequencies and no positions are kept.
    builder.add_text_field(FIELD, tokenizer_name="raw", index_option="basic")
    return builder.build()


def create_index(folder: Path) -> tantivy.Index:
    """The index in the folder, created there if it is not."""
    return _ready(tantivy.Index(index_schema(), str(folder)))


def memory_index() -> tantivy.Index:
    """An index in memory, for the thread that makes it."""
    return _ready(tantivy.Index(index_schema()))


def open_index(folder: Path) -> tantivy.Index:
    """The index that is in the folder."""
    return _ready(tantivy.Index.open(str(folder)))


def _ready(index: tantivy.Index) -> tantivy.Index:
    # Reloaded when the freshness record says so. A thread that watched would be late, and in memory in the way: whoever
    # reloads while it does waits for a tenth of a second.
    index.config_reader(reload_policy="manual")
    return index


def read_spec(folder: Path) -> SearchIndex:
    """The declaration that the index in the folder was last written with.

    Raises:
        IndexLayoutError: the fields of that index are of another version of Deltaworks.
    """
    text = (folder / SPEC_FILE).read_text(encoding="utf-8")
    layout = json.loads(text).get("layout")
    if layout != LAYOUT:
        raise IndexLayoutError(
            f"cannot read the search index {str(folder)!r}: it has layout {layout!r}, and this version of Deltaworks "
            f"reads {LAYOUT}; {how_to_rebuild(folder)}"
        )
    return SearchIndex.from_json(text)


def how_to_rebuild(folder: Path) -> str:
    """What to do where the index in the folder cannot be used as it is."""
    return (
        f"to rebuild it, stop the app, remove {str(folder)!r} and the app's checkpoint, and start the app: "
        "it replays the log"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshnessRecord:
    """What the writer records after a flush; `committed_at` is that of the newest change in the index.

    `commit` changes with tantivy's commits. `recent` are the numbers of the files with recent documents, oldest first,
    and how many bytes of each count.
    """

    position: Lsn = START
    committed_at: datetime | None = None
    flushed_at: datetime
    commit: int = 0
    recent: tuple[tuple[int, int], ...] = ()

    def save(self, folder: Path) -> None:
        """Replace the record. Not synced: after a power cut an older one, or none, claims too little."""
        values = {
            "position": self.position.value,
            "committed_at": self.committed_at and self.committed_at.isoformat(),
            "flushed_at": self.flushed_at.isoformat(),
            "commit": self.commit,
            "recent": self.recent,
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
            commit=values["commit"],
            recent=tuple((number, size) for number, size in values["recent"]),
        )


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    # Rename is atomic only inside one folder, so the new text is written next to its final name.
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
