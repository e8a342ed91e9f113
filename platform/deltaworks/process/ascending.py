"""Keys that ascend, as those of a dump do: they are told apart and found again without a hash of each."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Integers: TypeAlias = npt.NDArray[Any]


def ascending(keys: pa.Array | pa.ChunkedArray) -> Integers | None:
    """The keys where each is an integer larger than the one before, so that none is there twice; else `None`.

    >>> ascending(pa.array([1, 3, 7])), ascending(pa.array([1, 1])), ascending(pa.array(["a", "b"]))
    (array([1, 3, 7]), None, None)
    """
    if not pa.types.is_integer(keys.type) or keys.null_count:
        return None
    values = keys.to_numpy()
    return values if bool(np.all(values[1:] > values[:-1])) else None


def places_of(some: pa.Array | pa.ChunkedArray, keys: pa.Array | pa.ChunkedArray) -> Integers | None:
    """Where each of `some` is among `keys`; `None` where either does not ascend, or one of `some` is not there.

    >>> places_of(pa.array([3, 7]), pa.array([1, 3, 5, 7])), places_of(pa.array([4]), pa.array([1, 3]))
    (array([1, 3]), None)
    """
    wanted, known = ascending(some), ascending(keys)
    if wanted is None or known is None or len(wanted) > len(known):
        return None
    if len(wanted) and int(known[-1]) - int(known[0]) == len(known) - 1:
        # No number is left out, as in most dumps: a place is a difference.
        return wanted - known[0] if wanted[0] >= known[0] and wanted[-1] <= known[-1] else None
    places = np.searchsorted(known, wanted)
    is_there = not len(places) or (places[-1] < len(known) and bool(np.all(known[places] == wanted)))
    return places if is_there else None


def last_of_each(keys: pa.Array) -> Integers:
    """The place of the last row of each key, in the order of the rows.

    >>> last_of_each(pa.array(["a", "b", "a"]))
    array([1, 2])
    """
    if ascending(keys) is not None:
        return np.arange(len(keys))
    encoded = keys.dictionary_encode()
    last = np.empty(len(encoded.dictionary), dtype=np.int64)
    # Of several values for one place, numpy keeps the last.
    last[encoded.indices.to_numpy()] = np.arange(len(keys))
    last.sort()
    return last
