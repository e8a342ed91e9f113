"""Where the rows of keys are: which is the last of each, and which of some keys are where among others.

    ascending integers, as of a dump    compared with their neighbours
    other integers                      hashed by NumPy, in rounds: the last row of each slot; other keys go on
    texts                               hashed by Arrow

Arrow's hash tables grow as they are filled, which for a few hundred thousand keys takes three to six times as long.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Integers: TypeAlias = npt.NDArray[Any]

_ROUNDS = 24
_GOLDEN = 0x9E3779B97F4A7C15
_EMPTY = np.int32(-1)
_LONG_BITS = 63
_LEAST_BITS, _SPARE_BITS = 8, 2
"""Four to eight slots for each key: so a round leaves about a tenth of the keys, and ten rounds none."""


def ascending(keys: pa.Array | pa.ChunkedArray) -> Integers | None:
    """The keys where each is an integer larger than the one before, so that none is there twice; else `None`.

    >>> ascending(pa.array([1, 3, 7])), ascending(pa.array([1, 1])), ascending(pa.array(["a", "b"]))
    (array([1, 3, 7]), None, None)
    """
    values = _integers(keys)
    return values if values is not None and bool(np.all(values[1:] > values[:-1])) else None


def places_of(some: pa.Array | pa.ChunkedArray, keys: pa.Array | pa.ChunkedArray) -> Integers | None:
    """Where each of `some` is among `keys`, which are there once each.

    `None` where one of `some` is there twice or not among `keys`, and where they are no integers that are not the same.

    >>> places_of(pa.array([3, 7]), pa.array([1, 3, 5, 7])), places_of(pa.array([4]), pa.array([1, 3]))
    (array([1, 3]), None)
    >>> places_of(pa.array([5, 9]), pa.chunked_array([[9, 1, 5]])), places_of(pa.array([9, 9]), pa.array([9, 1]))
    (array([2, 0]), None)
    """
    if type(some) is type(keys) and len(some) == len(keys) and some.equals(keys):
        return np.arange(len(keys))
    wanted, known = _integers(some), _integers(keys)
    if wanted is None or known is None or len(wanted) > len(known):
        return None
    if not len(wanted):
        return np.empty(0, np.int64)
    if ascending(keys) is not None and ascending(some) is not None:
        return _places_in_order(wanted, known)
    slots = _Slots(known)
    deque(slots.fill(), maxlen=0)
    places = slots.find(wanted)
    if places is None:
        return None
    is_found = np.zeros(len(known), bool)
    is_found[places] = True
    return places if np.count_nonzero(is_found) == len(places) else None


def last_of_each(keys: pa.Array) -> Integers:
    """The place of the last row of each key, in the order of the rows.

    >>> last_of_each(pa.array(["a", "b", "a"])), last_of_each(pa.array([7, 3, 7]))
    (array([1, 2]), array([1, 2]))
    """
    if ascending(keys) is not None:
        return np.arange(len(keys))
    if (values := _integers(keys)) is not None:
        is_last = np.zeros(len(values), bool)
        for places in _Slots(values).fill():
            is_last[places] = True
        return np.flatnonzero(is_last)
    encoded = keys.dictionary_encode()
    last = np.empty(len(encoded.dictionary), dtype=np.int64)
    # Of several values for one place, numpy keeps the last.
    last[encoded.indices.to_numpy(zero_copy_only=False)] = np.arange(len(keys))
    last.sort()
    return last


def last_by_key(keys: Integers) -> Integers:
    """The same in the order of the keys, which are integers.

    >>> last_by_key(np.array([7, 3, 7]))
    array([1, 2])
    """
    if not len(keys):
        return np.empty(0, np.int64)
    lowest, place_bits = keys.min(), (len(keys) - 1).bit_length()
    if (int(keys.max()) - int(lowest)).bit_length() + place_bits < _LONG_BITS:
        # Key and place in one number: to sort numbers takes a fifth of the time of sorting places by them stably.
        both = ((keys - lowest).astype(np.int64) << place_bits) | np.arange(len(keys))
        both.sort()
        places: Integers = both[_is_last(both >> place_bits)] & ((1 << place_bits) - 1)
        return places
    order: Integers = np.argsort(keys, kind="stable")
    return order[_is_last(keys[order])]


def _is_last(values: Integers) -> Integers:
    """Which of values that are in order have another one, or nothing, behind them."""
    is_last = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_last[:-1])
    return is_last


def _integers(keys: pa.Array | pa.ChunkedArray) -> Integers | None:
    if not pa.types.is_signed_integer(keys.type) or keys.null_count:
        return None
    values: Integers = keys.to_numpy()
    return values.astype(np.int64, copy=False)


def _places_in_order(wanted: Integers, known: Integers) -> Integers | None:
    if int(known[-1]) - int(known[0]) == len(known) - 1:
        # No number is left out, as in most dumps: a place is a difference.
        return wanted - known[0] if wanted[0] >= known[0] and wanted[-1] <= known[-1] else None
    places = np.searchsorted(known, wanted)
    return places if places[-1] < len(known) and bool(np.all(known[places] == wanted)) else None


class _Slots:
    """Integer keys by the slots that they hash to: round after round those that another key kept out of theirs."""

    def __init__(self, keys: Integers) -> None:
        self._keys = keys
        self._tables: list[npt.NDArray[np.int32]] = []
        self._rest: dict[int, int] = {}

    def fill(self) -> Iterator[npt.NDArray[np.int32]]:
        """Fill the slots; gives rows of which each is the last one of its key, of all keys in the end."""
        keys, places = self._keys, np.arange(len(self._keys), dtype=np.int32)
        while len(places) and len(self._tables) < _ROUNDS:
            bits = max(_LEAST_BITS, (len(places) - 1).bit_length() + _SPARE_BITS)
            slots = _slots_of(keys, bits, len(self._tables))
            table = np.full(1 << bits, _EMPTY)
            # Of several rows for one slot, numpy keeps the last; and all rows of a key have one slot.
            table[slots] = places
            self._tables.append(table)
            there = table[slots]
            yield there
            left = np.flatnonzero(self._keys[there] != keys)
            keys, places = keys[left], places[left]
        # Keys that were chosen to meet in every round.
        self._rest = dict(zip(keys.tolist(), places.tolist(), strict=True))
        yield np.fromiter(self._rest.values(), np.int32, len(self._rest))

    def find(self, wanted: Integers) -> Integers | None:
        """The place of each of `wanted`; `None` where one is not there."""
        places = np.empty(len(wanted), np.int64)
        left = np.arange(len(wanted))
        for number, table in enumerate(self._tables):
            there = table[_slots_of(wanted, len(table).bit_length() - 1, number)]
            if there.min() == _EMPTY:
                return None
            is_it = self._keys[there] == wanted
            places[left] = there
            others = np.flatnonzero(~is_it)
            if not len(others):
                return places
            left, wanted = left[others], wanted[others]
        if not all(key in self._rest for key in wanted.tolist()):
            return None
        places[left] = [self._rest[key] for key in wanted.tolist()]
        return places


def _slots_of(keys: Integers, bits: int, number: int) -> Integers:
    """Other slots in each round, by the highest bits of a product."""
    factor = np.uint64(_GOLDEN * pow(2 * number + 1, 5) % (1 << 64))
    return ((keys.view(np.uint64) * factor) >> np.uint64(64 - bits)).view(np.int64)
