"""A row keeps its identity through every change of its key."""

import pytest

from deltaworks.store.apply import Step, Traced, trace_moves


def move(place: int, old: int, new: int, *, commit: int = 1) -> Step:
    return Step(place=place, commit=commit, op="u", key=new, old_key=old)


def change(place: int, key: int, op: str = "u", *, commit: int = 1) -> Step:
    return Step(place=place, commit=commit, op=op, key=key)


@pytest.mark.parametrize(
    ("steps", "present", "life", "origin"),
    [
        pytest.param([move(0, 1, 2), move(1, 2, 3)], [1], ((0, 0), (1, 0)), ((0, 1),), id="a chain is one row"),
        pytest.param([move(0, 1, 2), move(1, 2, 1)], [1], ((0, 0), (1, 0)), ((0, 1),), id="there and back"),
        pytest.param([move(0, 1, 2), change(1, 2, "d")], [1], (), (), id="a moved row is deleted"),
        pytest.param([change(0, 2, "d"), move(1, 1, 2)], [1, 2], ((1, 0),), ((0, 1),), id="a row moves to a freed key"),
        pytest.param([move(0, 1, 2)], [], ((0, 0),), (), id="a row the table never had"),
        pytest.param(
            [move(0, 1, 2), change(1, 1, "c")], [1], ((0, 0), (1, 1)), ((0, 1),), id="a new row on the freed key"
        ),
        pytest.param(
            [move(0, 1, 9), move(1, 2, 1), move(2, 9, 2)],
            [1, 2],
            ((0, 0), (1, 1), (2, 0)),
            ((0, 1), (1, 2)),
            id="a swap over a third key",
        ),
        pytest.param(
            [move(0, 1, 2), move(1, 2, 3), move(2, 3, 1)],
            [1, 2, 3],
            ((0, 0), (1, 1), (2, 2)),
            ((0, 1), (1, 2), (2, 3)),
            id="a rotation under a deferred constraint",
        ),
        pytest.param(
            [move(0, 1, 2), move(1, 2, 3, commit=2)], [1, 2], ((0, 0), (1, 0)), ((0, 1),), id="one row at each commit"
        ),
    ],
)
def test_rows_are_followed(steps, present, life, origin):
    assert trace_moves(steps, present) == Traced(life=life, origin=origin)


def test_entities_start_where_asked():
    assert trace_moves([move(0, 1, 2)], [1], first_entity=70) == Traced(life=((0, 70),), origin=((70, 1),))
