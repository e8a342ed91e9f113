"""What is done faster for keys that ascend comes to the same as for any others."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.process.ascending import ascending, last_of_each, places_of
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY
from deltaworks.process.direct import document_batch

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


@settings(deadline=None)
@given(KEYS, KEYS)
def test_places_are_those_of_the_same_keys(some: list[int], keys: list[int]) -> None:
    places = places_of(array(some), array(keys))
    can_be = some == sorted(set(some)) and keys == sorted(set(keys)) and set(some) <= set(keys)
    assert (None if places is None else places.tolist()) == ([keys.index(key) for key in some] if can_be else None)


@settings(deadline=None)
@given(SORTED, st.data())
def test_a_batch_is_the_same_whatever_the_order_of_its_rows(keys: list[int], data: st.DataObject) -> None:
    kept = [key for key in keys if data.draw(st.booleans())]
    shuffled = data.draw(st.permutations(keys))

    def batch(order: list[int]) -> DocumentBatch:
        meta = {name: pa.array(order, pa.int64()) for name in (KEY, "_commit", "_ordinal", "_committed_at")}
        made = [key for key in order if key in kept]
        bodies = {KEY: pa.array(made, pa.int64()), "title": pa.array(made, pa.int64())}
        return document_batch(pa.table(meta), pa.table(bodies))

    for found in (batch(keys), batch(shuffled)):
        assert found.meta.column("_commit").to_pylist() == found.bodies.column("title").to_pylist()
        assert sorted(found.meta.column(KEY).to_pylist()) == kept
        assert sorted(found.gone.column(KEY).to_pylist()) == [key for key in keys if key not in kept]
