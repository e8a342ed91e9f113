"""What left: the hash of the document of each key that left last, for `App.dedup`.

A hash counts only while no other document of its key is on its way. It is forgotten, on disk, before another one is
written, and known again when the sinks are durable; so a crash in between writes a document twice and never
holds back one that the sinks do not have.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence

from deltaworks.process.declared import DedupStep
from deltaworks.process.fold import Key
from deltaworks.process.sink import Document

STATEMENT = "create table sent (_key primary key, hash blob) without rowid"
"""What creates the table."""


class Sent:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def split(self, step: DedupStep, documents: Sequence[Document]) -> Mapping[Key, bytes]:
        """The documents that differ from what left last, by key with their hash."""
        hashes = {document.key: _hash(step, document) for document in documents}
        known = self._known(list(hashes))
        return {key: value for key, value in hashes.items() if known.get(key) != value}

    def are_known(self, keys: Sequence[Key]) -> bool:
        """Whether a hash of any of them has to be forgotten before another document leaves."""
        return any(value is not None for value in self._known(keys).values())

    def forget(self, keys: Sequence[Key]) -> None:
        """Forget what left last of these keys; inside `folding`."""
        self._connection.execute(
            "update sent set hash = null where _key in (select value from json_each(?))", (json.dumps(list(keys)),)
        )

    def remember(self, hashes: Mapping[Key, bytes]) -> None:
        """Know what left; inside `settling`, after every sink has flushed."""
        self._connection.executemany("insert or replace into sent values (?, ?)", hashes.items())

    def _known(self, keys: Sequence[Key]) -> dict[Key, bytes | None]:
        found = self._connection.execute(
            "select s._key, s.hash from json_each(?) k cross join sent s on s._key = k.value", (json.dumps(list(keys)),)
        )
        return dict(found)


def _hash(step: DedupStep, document: Document) -> bytes:
    if document.body is None:
        return b""
    chosen = {name: document.body[name] for name in step.fields} if step.fields else document.body
    text = json.dumps(chosen, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
