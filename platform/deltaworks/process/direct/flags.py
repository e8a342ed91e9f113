"""Which rows of a table something is true of: NumPy has a byte for each, Arrow a bit."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Flags: TypeAlias = npt.NDArray[np.bool_]


def flag_array(flags: Flags) -> pa.Array:
    """The flags as Arrow takes them; a fraction of the time of `pa.array`, which looks at each.

    >>> flag_array(np.array([True, False, True])).to_pylist()
    [True, False, True]
    """
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, flag_bits(flags)])


def flag_bits(flags: Flags) -> pa.Buffer:
    """The bits of it, also as those of a column that has a value where there is a flag."""
    return pa.py_buffer(np.packbits(flags, bitorder="little"))
