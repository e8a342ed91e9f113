"""Compilation of the loops over bytes: numba, without the lock of the interpreter, kept on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from deltaworks.capture.memory import refused

# Numba looks for scipy and takes its linear algebra along: 16 MB that no loop here has a use for.
with refused("scipy"):
    from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])  # Any: each function has its own signature

Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


def compiled(function: _F) -> _F:
    """The function as machine code, made on its first call: seconds then, and milliseconds in later processes.

    It may use numbers and arrays only. Index errors are not checked in there, so every function
    checks its bounds against the length it was given.
    """
    # What numba gives back is called as the function was, but its type says less.
    return cast(_F, njit(nogil=True, cache=True)(function))


@compiled
def u16(data: Bytes, at: int) -> int:
    """The big-endian number in the two bytes from `at`."""
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])  # type: ignore[return-value]  # numpy's int64 is an int here


@compiled
def u32(data: Bytes, at: int) -> int:
    """The big-endian number in the four bytes from `at`."""
    high = np.int64(data[at]) << 24 | np.int64(data[at + 1]) << 16
    return high | np.int64(data[at + 2]) << 8 | np.int64(data[at + 3])  # type: ignore[return-value]  # as above


@compiled
def i64(data: Bytes, at: int) -> int:
    """The big-endian number in the eight bytes from `at`; positions above 2^63 do not exist."""
    return u32(data, at) << 32 | u32(data, at + 4)
