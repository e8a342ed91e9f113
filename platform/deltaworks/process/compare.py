"""Two sets of documents compared both ways: what only one has, what differs, and how often each document is there.

    old ──► key, position, hash ─┐
                                 ├─ except, both ways ──► keys that differ
    new ──► key, position, hash ─┘  count per hash    ──► documents as a multiset

A document's hash is of its canonical form, so columns may stand in any order and times in any zone. What is compared
lies in a SQLite file, so memory does not grow with the documents.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Self

from deltaworks.position import Lsn
from deltaworks.process.document_json import document_json
from deltaworks.process.sink import SinkReader

KEYS_AT_ONCE = 5_000
KINDS = ("only_old", "only_new", "changed")
EXAMPLES = 10
"""Keys that are named of each kind of difference."""

_TABLES = """
create table old (key text primary key, position int not null, hash blob) without rowid;
create table new (key text primary key, position int not null, hash blob) without rowid;
create table apart (key text primary key) without rowid;
"""
_SIDE = """
create temp table {side}_wanted as
select key, position, hash from {side}
where hash is not null and key not in (select key from apart)
  and (:after = 0 or key in (select key from new where position > :after))
"""
_TOLD = """
create temp table told as
with differing as (
  select key from (select key, hash from old_wanted except select key, hash from new_wanted)
  union
  select key from (select key, hash from new_wanted except select key, hash from old_wanted)
)
select
  d.key,
  case
    when max(coalesce(a.position, 0), coalesce(b.position, 0)) > :settled then 'moving'
    when a.hash is null then 'only_new'
    when b.hash is null then 'only_old'
    else 'changed'
  end as kind
from differing as d left join old as a using (key) left join new as b using (key)
"""
_MULTISET = """
select coalesce(sum(abs(n)), 0) from (
  select sum(n) as n from (
    select key, hash, 1 as n from old_wanted union all select key, hash, -1 from new_wanted
  ) where key not in (select key from told where kind = 'moving') group by hash
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Old and new documents of one sink. `old`, `new` count documents; the others keys, with some of them as examples.

    `moving` keys changed after what both have seen, so nothing can be said of them; they are in no other number.
    `multiset` counts documents that one has more often than the other, whatever their keys.
    """

    sink: str
    old: int
    new: int
    only_old: int
    only_new: int
    changed: int
    multiset: int
    moving: int
    examples: Mapping[str, tuple[str, ...]]

    @property
    def differing(self) -> int:
        """Keys with another document, or with one on one side only."""
        return self.only_old + self.only_new + self.changed

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """All of it as JSON values."""
        counts = ("old", "new", "only_old", "only_new", "changed", "multiset", "moving")
        return {
            "sink": self.sink,
            **{name: getattr(self, name) for name in counts},
            "examples": {kind: list(keys) for kind, keys in self.examples.items()},
        }


class Comparing:
    """Holds what two readers gave, in a file that is made anew. A context manager; serves one thread."""

    def __init__(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(file)
        self._connection.executescript(_TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._connection.close()

    def take_old(self, reader: SinkReader) -> None:
        """Keep what a sink holds as the old documents; closes the reader."""
        self._take("old", reader)

    def take_new(self, reader: SinkReader) -> None:
        """Keep what a sink holds as the new documents; closes the reader."""
        self._take("new", reader)

    def old_keys(self, *, after: Lsn) -> list[str]:
        """Keys whose old document is of a change after a position."""
        rows = self._connection.execute("select key from old where position > ?", (after.value,))
        return [key for (key,) in rows]

    def compare(self, *, sink: str, after: Lsn, settled: Lsn, apart: Iterable[str] = ()) -> Comparison:
        """Compare the keys that the new side took up after a position, all for the start, and none that is `apart`.

        What changed after `settled` is only counted.
        """
        self._connection.execute("delete from apart")
        self._connection.executemany("insert or ignore into apart values (?)", ((key,) for key in apart))
        run = self._connection.execute
        for table in ("told", "old_wanted", "new_wanted"):
            run(f"drop table if exists temp.{table}")
        for side in ("old", "new"):
            run(_SIDE.format(side=side), {"after": after.value})
        run(_TOLD, {"settled": settled.value})
        counts = dict(run("select kind, count(*) from told group by kind"))
        named = "select key from told where kind = ? order by length(key), key limit ?"
        return Comparison(
            sink=sink,
            old=_number(run("select count(*) from old_wanted")),
            new=_number(run("select count(*) from new_wanted")),
            multiset=_number(run(_MULTISET)),
            examples={
                kind: tuple(key for (key,) in run(named, (kind, EXAMPLES))) for kind in KINDS if counts.get(kind)
            },
            moving=counts.get("moving", 0),
            **{kind: counts.get(kind, 0) for kind in KINDS},
        )

    def _take(self, side: str, reader: SinkReader) -> None:
        with self._connection, closing(reader):
            self._connection.execute(f"delete from {side}")
            versions = reader.versions()
            while page := list(islice(versions, KEYS_AT_ONCE)):
                bodies = reader.documents([each.key for each in page if not each.is_deleted])
                self._connection.executemany(
                    f"insert or replace into {side} values (?, ?, ?)",
                    (
                        (
                            each.key,
                            each.version.position.value,
                            canonical_hash(bodies[each.key]) if each.key in bodies else None,
                        )
                        for each in page
                    ),
                )


def canonical_hash(body: Mapping[str, Any]) -> bytes:
    """A hash that is equal for documents that say the same.

    >>> canonical_hash({"a": 1, "b": {"c": 2, "d": 3}}) == canonical_hash({"b": {"d": 3, "c": 2}, "a": 1})
    True
    """
    plain = json.loads(document_json({name: _in_utc(value) for name, value in body.items()}))
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).digest()


def _number(cursor: sqlite3.Cursor) -> int:
    return int(cursor.fetchone()[0])


def _in_utc(value: Any) -> Any:  # Any: a document is any JSON-like value
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    if isinstance(value, Mapping):
        return {name: _in_utc(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_utc(item) for item in value]
    return value
