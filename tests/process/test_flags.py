"""Flags as Arrow has them, and the letters of changes as bytes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.change import MalformedBatchError, op_letters
from deltaworks.process.direct.flags import flag_array, flag_bits

OPS = st.lists(st.sampled_from("cudrtm"), max_size=40)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_flags_are_what_arrow_makes_of_them(flags: list[bool]) -> None:
    assert flag_array(np.array(flags, bool)).equals(pa.array(flags, pa.bool_()))
    some = pa.Array.from_buffers(
        pa.int32(), len(flags), [flag_bits(np.array(flags, bool)), pa.py_buffer(np.zeros(len(flags), np.int32))]
    )
    assert some.to_pylist() == [0 if flag else None for flag in flags]


@settings(deadline=None)
@given(OPS, st.integers(0, 5), st.lists(OPS, max_size=3))
def test_letters_are_those_of_any_slice_and_of_any_pieces(ops: list[str], start: int, more: list[list[str]]) -> None:
    column = pa.array(ops, pa.string()).slice(start)
    assert op_letters(column).tolist() == [ord(op) for op in ops[start:]]
    pieces = pa.chunked_array([column, *(pa.array(each, pa.string()) for each in more)])
    assert op_letters(pieces).tolist() == [ord(op) for op in pieces.to_pylist()]


def test_an_op_of_several_letters_is_no_change() -> None:
    with pytest.raises(MalformedBatchError, match="2 of them have ops of 7 letters"):
        op_letters(pa.array(["u", "delete"]))
