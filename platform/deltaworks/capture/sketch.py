"""A sketch of a set of changes, out of which a small difference between two sets can be read.

    log      change hashes ──► 96 cells ─┐
                                         ├─ subtract ──► the hashes that one has and the other has not
    any hop  change hashes ──► 96 cells ─┘

A window says that changes were lost, a sketch says which: an invertible Bloom lookup table (Goodrich,
Mitzenmacher: Invertible Bloom lookup tables, 2011). Each hash is in one cell of each of three rows, picked by
its own bits; a cell has the count, sum and xor of the hashes in it. What both sets have cancels out. A cell in
which one hash is left gives it away, and taking it out of its other two cells sets free the next one. About 50
lost changes can be read from 2 kB, whatever the size of the sets; past that the answer says that it is not whole.
"""

import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from deltaworks.capture.proof import Words, change_hashes
from deltaworks.change import ChangeBatch

_ROWS, _WIDTH = 3, 32
_CELLS = _ROWS * _WIDTH
_BITS = np.uint64(5)
_MASK = (1 << 64) - 1
_AT_ONCE = 32_768
"""Hashes that a processor's cache holds while they are put in order; more at once take twice as long each."""


def _no_counts() -> npt.NDArray[np.int64]:
    return np.zeros(_CELLS, np.int64)


def _no_words() -> Words:
    return np.zeros(_CELLS, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """The cells; sketches merge and subtract in any order, as windows do."""

    counts: npt.NDArray[np.int64] = field(default_factory=_no_counts)
    sums: Words = field(default_factory=_no_words)
    xors: Words = field(default_factory=_no_words)

    @classmethod
    def of(cls, batches: Iterable[ChangeBatch]) -> Self:
        """The changes of these batches."""
        hashes = [change_hashes(batch) for batch in batches]
        return cls.of_hashes(np.concatenate(hashes)) if hashes else cls()

    @classmethod
    def of_hashes(cls, hashes: Words) -> Self:
        """These hashes; one that comes twice counts twice."""
        sketch = cls()
        for start in range(0, hashes.size, _AT_ONCE):
            for row in range(_ROWS):
                sketch._add_row(row, hashes[start : start + _AT_ONCE])
        return sketch

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` gave."""
        words = np.frombuffer(zlib.decompress(b64decode(text)), "<u8").reshape(3, _CELLS).copy()
        return cls(words[0].view(np.int64), words[1], words[2])

    def to_text(self) -> str:
        """The cells as text; short where few changes are in them."""
        words = np.stack([self.counts.view(np.uint64), self.sums, self.xors]).astype("<u8")
        return b64encode(zlib.compress(words.tobytes(), 1)).decode()

    def merge(self, other: Self) -> Self:
        """Both together."""
        return type(self)(self.counts + other.counts, self.sums + other.sums, self.xors ^ other.xors)

    def subtract(self, other: Self) -> Self:
        """What is left without the other."""
        return type(self)(self.counts - other.counts, self.sums - other.sums, self.xors ^ other.xors)

    def decode(self) -> "Difference":
        """The hashes that are in it, each with how often: below 0 for one that was subtracted and not there."""
        left = self.merge(type(self)())
        found: dict[int, int] = {}
        free = list(range(_CELLS))
        while free:
            cell = free.pop()
            hashed, sign = int(left.xors[cell]), int(left.counts[cell])
            # With more than one hash in it, sum and xor agree only by a chance of one in 2^64.
            if sign not in (1, -1) or (sign * int(left.sums[cell])) & _MASK != hashed:
                continue
            found[hashed] = found.get(hashed, 0) + sign
            cells = _cells_of(hashed)
            left._take(hashed, sign, cells)
            free += cells
        return Difference({hashed: count for hashed, count in found.items() if count}, is_whole=not left.counts.any())

    def _add_row(self, row: int, hashes: Words) -> None:
        cells = ((hashes >> (_BITS * np.uint64(row))) & np.uint64(_WIDTH - 1)).astype(np.uint8)
        # A stable sort of bytes is a radix sort, and sums of runs are ten times as fast as adding at places.
        sorted_hashes = hashes[np.argsort(cells, kind="stable")]
        counts = np.bincount(cells, minlength=_WIDTH)
        ends = np.cumsum(counts)
        here = np.flatnonzero(counts)
        starts = (ends - counts)[here]
        places = here + row * _WIDTH
        self.counts[places] += counts[here]
        self.sums[places] += np.add.reduceat(sorted_hashes, starts)
        self.xors[places] ^= np.bitwise_xor.reduceat(sorted_hashes, starts)

    def _take(self, hashed: int, sign: int, cells: Iterable[int]) -> None:
        for cell in cells:
            self.counts[cell] -= sign
            self.sums[cell] = np.uint64((int(self.sums[cell]) - sign * hashed) & _MASK)
            self.xors[cell] ^= np.uint64(hashed)


@dataclass(frozen=True, slots=True)
class Difference:
    """Hashes with how often they are more on one side; `is_whole` says that these are all of them."""

    hashes: Mapping[int, int]
    is_whole: bool = field(kw_only=True)


def _cells_of(hashed: int) -> list[int]:
    return [row * _WIDTH + ((hashed >> (int(_BITS) * row)) & (_WIDTH - 1)) for row in range(_ROWS)]
