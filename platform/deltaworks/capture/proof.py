"""The proof that nothing is lost: what the reader saw, in a form that every later hop can compute again.

    reader    ──► Chain: each transaction after which one, and the how many-th
              └─► WindowSet: per table and minute of commit, count, sum and xor of the changes' hashes
    any hop   ──► the same two from what it has; in = out + filtered + dead + held, or something is lost

A count alone misses a change lost beside another doubled; sum and xor of hashes do not. The sets form a group:
they merge and subtract in any order, so a hop adds up what it passed on without keeping it.

The hash is defined here and never changes, because it is stored. All in 64 bits, without carry:

    mix(x)      the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators)
    fold(h, w)  mix((h xor w) + 0x9E3779B97F4A7C15)
    change      h = 0; fold in the commit position, the ordinal, then the digest of each key column
    number, date, time, truth    its bits as a signed 64-bit integer; of a float the bits of the double
    decimal     h = 16; fold in the low and the high half of its unscaled value
    text, bytes h = length in bytes; fold in each run of 8 bytes, little-endian, the last padded with zeros
    list        h = length; fold in the digest of each element
    null        0x6E756C6C; where `_as_text` has the column's value, the digest of that text
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.change import MESSAGES, ChangeBatch
from deltaworks.errors import InvariantError
from deltaworks.position import START, Lsn
from deltaworks.schema import AS_TEXT

Words: TypeAlias = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_NULL = np.uint64(0x6E756C6C)
_MODULUS = 1 << 64
_MINUTE_US = 60_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BrokenProofError(InvariantError):
    """Changes were lost or doubled between two hops; nothing behind that place may be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The changes of one table that were committed in one minute; sum and xor are over their hashes."""

    count: int
    sum: int
    xor: int

    def merge(self, other: Self) -> Self:
        """Both together."""
        return type(self)(
            count=self.count + other.count, sum=(self.sum + other.sum) % _MODULUS, xor=self.xor ^ other.xor
        )

    def subtract(self, other: Self) -> Self:
        """What is left without the other; a negative count says that the other had more."""
        return type(self)(
            count=self.count - other.count, sum=(self.sum - other.sum) % _MODULUS, xor=self.xor ^ other.xor
        )


NO_CHANGES = Window(count=0, sum=0, xor=0)

WindowKey = tuple[str, int]
"""A table's full name, and the minute of the commit time since 1970 in UTC."""


@dataclass(frozen=True, slots=True)
class WindowSet:
    """Which changes passed a place, per table and minute of commit. A window without changes is left out.

    >>> two = WindowSet({("public.movie", 0): Window(count=2, sum=5, xor=1)})
    >>> one = WindowSet({("public.movie", 0): Window(count=1, sum=3, xor=2)})
    >>> two.subtract(one).merge(one) == two, two.subtract(two) == WindowSet()
    (True, True)
    """

    windows: Mapping[WindowKey, Window] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, batches: Iterable[ChangeBatch]) -> Self:
        """The changes of these batches, reads of a dump included; messages are left out, no hop passes them on."""
        return cls.of_hashed((batch, change_hashes(batch)) for batch in batches)

    @classmethod
    def of_hashed(cls, hashed: Iterable[tuple[ChangeBatch, Words]]) -> Self:
        """The changes of these batches, each with its `change_hashes`."""
        found: dict[WindowKey, Window] = {}
        for batch, hashes in hashed:
            if batch.schema.name == MESSAGES:
                continue
            for key, window in _windows(batch, hashes):
                found[key] = found[key].merge(window) if key in found else window
        return cls(found)

    @classmethod
    def from_json(cls, stored: Iterable[Sequence[Any]]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(
            {
                (table, minute): Window(count=count, sum=int(total, 16), xor=int(xor, 16))
                for table, minute, count, total, xor in stored
            }
        )

    def to_json(self) -> list[list[Any]]:  # Any: JSON values
        """The set as JSON: `[table, minute, count, sum, xor]` each, the last two in hexadecimal.

        Most programs read a JSON number as a double, which has 53 bits.
        """
        return [
            [table, minute, window.count, f"{window.sum:x}", f"{window.xor:x}"]
            for (table, minute), window in sorted(self.windows.items())
        ]

    def merge(self, other: Self) -> Self:
        """Both together."""
        merged = dict(self.windows)
        for key, window in other.windows.items():
            merged[key] = merged.get(key, NO_CHANGES).merge(window)
        return self._without_empty(merged)

    def subtract(self, other: Self) -> Self:
        """What is left without the other; empty when both hold the same changes."""
        left = dict(self.windows)
        for key, window in other.windows.items():
            left[key] = left.get(key, NO_CHANGES).subtract(window)
        return self._without_empty(left)

    def of_tables(self, tables: Collection[str]) -> Self:
        """Those of some tables, by their full names."""
        return type(self)({key: window for key, window in self.windows.items() if key[0] in tables})

    def of_windows(self, keys: Collection[WindowKey]) -> Self:
        """Those windows, where they are here."""
        return type(self)({key: self.windows[key] for key in keys if key in self.windows})

    @property
    def counts(self) -> Mapping[str, int]:
        """Changes by the table's full name."""
        counts: dict[str, int] = {}
        for (table, _minute), window in self.windows.items():
            counts[table] = counts.get(table, 0) + window.count
        return counts

    def _without_empty(self, windows: Mapping[WindowKey, Window]) -> Self:
        return type(self)({key: window for key, window in windows.items() if window != NO_CHANGES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The transactions of a source up to one of them: each with its predecessor and its number.

    `position` is the commit position of the last one, `count` its number from 1, `digest` the sum of
    `fold(fold(fold(0, predecessor), position), number)` over all of them. Only transactions that changed
    a captured table count.
    """

    position: Lsn = START
    count: int = 0
    digest: int = 0

    @classmethod
    def from_json(cls, stored: Sequence[Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        position, count, digest = stored
        return cls(position=Lsn(position), count=count, digest=int(digest, 16))

    def to_json(self) -> list[Any]:  # Any: JSON values
        """The chain as JSON: `[position, count, digest]`, the last in hexadecimal."""
        return [self.position.value, self.count, f"{self.digest:x}"]

    def after(self, batches: Iterable[ChangeBatch]) -> Self:
        """The chain with the transactions of these batches; what goes on of its last one adds nothing.

        Raises:
            BrokenProofError: a transaction was committed before the chain's last.
        """
        commits = _commits(batches)
        if not commits.size:
            return self
        if commits[0] < self.position.value:
            raise BrokenProofError(
                f"cannot go on after the transaction at {self.position}: the next one is at {Lsn(int(commits[0]))}, "
                "before it; stop, and compare with `deltaworks verify`"
            )
        if commits[0] == self.position.value:
            commits = commits[1:]
        return self._with(commits) if commits.size else self

    def _with(self, commits: Words) -> Self:
        before = np.concatenate([np.array([self.position.value], np.uint64), commits[:-1]])
        numbers = np.arange(self.count + 1, self.count + 1 + commits.size, dtype=np.uint64)
        links = _fold(_fold(_fold(np.zeros_like(commits), before), commits), numbers)
        return type(self)(
            position=Lsn(int(commits[-1])),
            count=self.count + commits.size,
            digest=(self.digest + int(links.sum(dtype=np.uint64))) % _MODULUS,
        )


NO_TRANSACTION = Chain()
"""The chain before the first transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the reader vouches for in one group: its changes, and the chain after its last transaction."""

    windows: WindowSet
    chain: Chain

    @classmethod
    def of(cls, batches: Sequence[ChangeBatch], *, after: Chain, transaction_count: int | None = None) -> Self:
        """The proof of a group that follows a group whose chain is `after`.

        `transaction_count` is how many transactions the stream itself counted in it, `None` for a part of one.

        Raises:
            BrokenProofError: it has another number of transactions, or one from before the chain's last.
        """
        chain = after.after(batches)
        if transaction_count is not None and chain.count - after.count != transaction_count:
            raise BrokenProofError(
                f"cannot vouch for the changes up to {chain.position}: the stream ended {transaction_count!r} "
                f"transactions, {chain.count - after.count!r} have changes; start again at the log's end"
            )
        return cls(windows=WindowSet.of(batches), chain=chain)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(windows=WindowSet.from_json(stored["windows"]), chain=Chain.from_json(stored["chain"]))

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The proof as JSON values."""
        return {"windows": self.windows.to_json(), "chain": self.chain.to_json()}


def minute_start(minute: int) -> datetime:
    """The time at which a window begins.

    >>> minute_start(29_000_000).isoformat()
    '2025-02-19T21:20:00+00:00'
    """
    return _EPOCH + timedelta(minutes=minute)


def change_hashes(batch: ChangeBatch) -> Words:
    """The hash of every change of a batch, as the module's docstring defines it."""
    rows = batch.rows
    hashes = _fold(np.zeros(rows.num_rows, np.uint64), _numbers(rows.column("_commit")))
    hashes = _fold(hashes, _numbers(rows.column("_ordinal")))
    for name in batch.schema.key:
        hashes = _fold(hashes, _key_digests(rows, name))
    return hashes


def key_hashes(batch: ChangeBatch) -> Words:
    """A hash of every change's key after the change; 0 for a table without a key. Stored, so it never changes."""
    hashes = np.zeros(batch.rows.num_rows, np.uint64)
    for name in batch.schema.key:
        hashes = _fold(hashes, _key_digests(batch.rows, name))
    return hashes


def text_hashes(texts: pa.Array) -> Words:
    """A hash of each text, as that of a column of a key."""
    return _digests(texts)


def _windows(batch: ChangeBatch, hashes: Words) -> Iterable[tuple[WindowKey, Window]]:
    table = str(batch.schema.name)
    committed_us = batch.rows.column("_committed_at").view(pa.int64()).to_numpy()
    first = int(committed_us.min()) // _MINUTE_US
    if first == int(committed_us.max()) // _MINUTE_US:
        yield (table, first), _window(hashes)
        return
    minutes = committed_us // _MINUTE_US
    # Commit times are taken before the commit, so a later transaction may have an earlier minute.
    for minute in np.unique(minutes).tolist():
        yield (table, minute), _window(hashes[minutes == minute])


def _window(hashes: Words) -> Window:
    return Window(count=hashes.size, sum=int(hashes.sum(dtype=np.uint64)), xor=int(np.bitwise_xor.reduce(hashes)))


def _commits(batches: Iterable[ChangeBatch]) -> Words:
    """The commit positions of the transactions in the batches, each once, in order; those of reads left out."""
    found = []
    for batch in batches:
        commits = batch.rows.column("_commit").to_numpy()
        # Reads of a dump have the transaction id 0, and nothing else has.
        streamed = commits[batch.rows.column("_txid").to_numpy() != 0]
        if streamed.size:
            # A transaction's changes lie together, so most of the repeats go without a sort.
            found.append(streamed[np.concatenate([[True], streamed[1:] != streamed[:-1]])])
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def _key_digests(rows: pa.RecordBatch, name: str) -> Words:
    column = rows.column(name)
    digests = _digests(column)
    if column.null_count and rows.column(AS_TEXT.name).null_count < rows.num_rows:
        texts = [dict(texts or ()).get(name) for texts in rows.column(AS_TEXT.name).to_pylist()]
        digests = np.where([text is not None for text in texts], _digests(pa.array(texts, pa.string())), digests)
    return digests


def _digests(column: pa.Array) -> Words:
    kind = column.type
    if not len(column):
        return np.empty(0, np.uint64)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        digests = _of_bytes(column)
    elif pa.types.is_list(kind):
        digests = _of_lists(column)
    elif pa.types.is_decimal(kind):
        digests = _of_decimals(column)
    else:
        digests = _numbers(column)
    if column.null_count:
        digests = np.where(column.is_null().to_numpy(zero_copy_only=False), _NULL, digests)
    return digests


def _numbers(column: pa.Array) -> Words:
    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.cast(column, pa.float64())
    elif pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int64())
    elif kind.bit_width != 64:
        numbers = np.dtype(f"{'u' if pa.types.is_unsigned_integer(kind) else 'i'}{kind.bit_width // 8}")
        values = np.frombuffer(column.buffers()[1], numbers)[column.offset : column.offset + len(column)]
        return values.astype(np.int64).view(np.uint64)
    return _values(column.view(pa.uint64()))


def _values(column: pa.Array) -> Words:
    """The values' own memory; what stands at a null is replaced by the caller."""
    values = np.frombuffer(column.buffers()[1], np.uint64)
    return values[column.offset : column.offset + len(column)]


def _of_decimals(column: pa.Array) -> Words:
    halves = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, column.type.byte_width // 8)
    halves = halves[column.offset : column.offset + len(column)]
    digests = np.full(len(column), column.type.byte_width, np.uint64)
    for half in range(halves.shape[1]):
        digests = _fold(digests, halves[:, half])
    return digests


def _of_bytes(column: pa.Array) -> Words:
    starts, lengths = _extents(column)
    data = column.buffers()[2]
    # Eight bytes may be read at any place up to the end, so seven follow it.
    padded = np.zeros((data.size if data is not None else 0) + 8, np.uint8)
    if data is not None:
        padded[: data.size] = np.frombuffer(data, np.uint8)
    anywhere = np.ndarray((padded.size - 7,), "<u8", padded, strides=(1,))
    digests = lengths.astype(np.uint64)
    for at in range(0, int(lengths.max(initial=0)), 8):
        here = np.flatnonzero(lengths > at)
        words = anywhere[starts[here] + at]
        missing = np.maximum(at + 8 - lengths[here], 0).astype(np.uint64) * np.uint64(8)
        # A word has at least one byte of its own here, so the shift stays below 64.
        words &= np.uint64(_MODULUS - 1) >> missing
        digests[here] = _fold(digests[here], words)
    return digests


def _of_lists(column: pa.Array) -> Words:
    starts, lengths = _extents(column)
    elements = _digests(column.values)
    digests = lengths.astype(np.uint64)
    for at in range(int(lengths.max(initial=0))):
        here = np.flatnonzero(lengths > at)
        digests[here] = _fold(digests[here], elements[starts[here] + at])
    return digests


def _extents(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each value begins, and its length; 0 for a null."""
    bounds = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(bounds).astype(np.int64)
    if column.null_count:
        lengths[column.is_null().to_numpy(zero_copy_only=False)] = 0
    return bounds[:-1].astype(np.int64), lengths


def _fold(hashes: Words, words: Words) -> Words:
    # In two arrays for all: what is in a processor's cache stays there.
    mixed = hashes ^ words
    mixed += _GAMMA
    shifted = mixed >> np.uint64(30)
    mixed ^= shifted
    mixed *= _MIX_1
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= _MIX_2
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed
