"""What is done faster for integers, and for those that ascend, comes to the same as for any other keys."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY
from deltaworks.process.direct import places
from deltaworks.process.direct.places import ascending, last_by_key, last_of_each, places_of
from deltaworks.process.direct.reducer import document_batch

INTEGERS = st.lists(st.one_of(st.integers(-5, 5), st.integers(-(2**63), 2**63 - 1)), max_size=12)
SORTED = st.sets(st.integers(-9, 9), max_size=12).map(sorted)
KEYS = st.one_of(INTEGERS, SORTED)


def array(keys: list[int]) -> pa.ChunkedArray:
    middle = len(keys) // 2
    return pa.chunked_array([pa.array(keys[:middle], pa.int64()), pa.array(keys[middle:], pa.int64())])


@settings(deadline=None)
@given(KEYS)
def test_ascending_is_told_from_any_other_order(keys: list[int]) -> None:
    assert (ascending(array(keys)) is not None) == (keys == sorted(set(keys)))
    assert ascending(pa.array([*keys, None], pa.int64())) is None


@settings(deadline=None)
@given(KEYS)
def test_the_last_row_of_each_key_is_found_in_any_order(keys: list[int]) -> None:
    last = {key: place for place, key in enumerate(keys)}
    assert last_of_each(pa.array(keys, pa.int64())).tolist() == sorted(last.values())
    assert last_by_key(np.array(keys, np.int64)).tolist() == [last[key] for key in sorted(last)]


@settings(deadline=None)
@given(KEYS, KEYS)
def test_places_are_those_of_the_same_keys(some: list[int], keys: list[int]) -> None:
    keys = list(dict.fromkeys(keys))
    found = places_of(array(some), array(keys))
    can_be = len(some) == len(set(some)) and set(some) <= set(keys)
    assert (None if found is None else found.tolist()) == ([keys.index(key) for key in some] if can_be else None)


@settings(deadline=None)
@given(SORTED, st.data())
def test_a_batch_is_the_same_whatever_the_order_of_its_rows(keys: list[int], data: st.DataObject) -> None:
    kept = [key for key in keys if data.draw(st.booleans())]
    shuffled = data.draw(st.permutations(keys))

    def batch(order: list[int]) -> tuple[DocumentBatch, list[bool]]:
        meta = {name: pa.array(order, pa.int64()) for name in (KEY, "_commit", "_ordinal", "_committed_at")}
        made = [key for key in order if key in kept]
        bodies = {KEY: pa.array(made, pa.int64()), "title": pa.array(made, pa.int64())}
        found, is_made = document_batch(pa.table(meta), pa.table(bodies))
        return found, is_made.tolist()

    for order in (keys, shuffled):
        found, is_made = batch(order)
        assert is_made == [key in kept for key in order]
        assert found.meta.column("_commit").to_pylist() == found.bodies.column("title").to_pylist()
        assert sorted(found.meta.column(KEY).to_pylist()) == kept
        assert sorted(found.gone.column(KEY).to_pylist()) == [key for key in keys if key not in kept]


def test_keys_that_were_chosen_to_meet_are_told_apart_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who picks the keys may know how they are hashed; then they are found one by one."""
    monkeypatch.setattr(places, "_slots_of", lambda keys, *_: np.zeros(len(keys), np.int64))
    keys = [5, -3, 5, 2**62, 7, -3, *range(100, 200)]
    assert last_of_each(pa.array(keys)).tolist() == [2, 3, 4, 5, *range(6, 106)]
    known = pa.array([9, 5, 2**62, -3, *range(200, 300)])
    assert places_of(pa.array([-3, 299, 9]), known).tolist() == [3, 103, 0]  # type: ignore[union-attr]
    assert places_of(pa.array([-3, 4]), known) is None


@settings(deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=300), st.data())
def test_many_keys_in_any_order(keys: list[int], data: st.DataObject) -> None:
    last = {key: place for place, key in enumerate(keys)}
    assert last_of_each(pa.array(keys)).tolist() == sorted(last.values())
    known = list(last)
    some = data.draw(st.lists(st.sampled_from(known), unique=True))
    assert places_of(array(some), array(known)).tolist() == [known.index(key) for key in some]  # type: ignore[union-attr]
    assert places_of(array([*some, 301]), array(known)) is None
