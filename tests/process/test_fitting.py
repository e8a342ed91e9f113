"""Whether a value is of its declared type: the fast way and the slow way agree, and the slow one names the place."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.process import fitting
from deltaworks.process.fitting import checker


class Person(TypedDict):
    """A record of keys."""

    name: str
    born: int | None


@dataclass
class Role:
    """A record of attributes."""

    part: str
    fee: float


@dataclass(frozen=True, slots=True)
class Award:
    """A record of slots."""

    title: str
    years: list[int]


DECLARED = [
    *(int, float, str, bool, bytes, date, datetime, Decimal, Any, int | str, Literal["a", 1]),
    *(Person, Role, Award, int | None, list[float], list[Person], list[Role | None], list[list[int]]),
]

_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, "a", "b", b"a", date(2026, 1, 1), datetime(2026, 1, 1, tzinfo=UTC), Decimal(1)]),
)
_NAMED = st.dictionaries(st.sampled_from(["name", "born", "more"]), _PLAIN, max_size=3)
_VALUES = st.recursive(
    st.one_of(
        _PLAIN,
        _NAMED,
        _NAMED.map(MappingProxyType),
        st.builds(Role, _PLAIN, _PLAIN),
        st.builds(Award, _PLAIN, st.lists(_PLAIN, max_size=2)),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner),
    max_leaves=4,
)


@given(declared=st.sampled_from(DECLARED), value=_VALUES)
def test_what_surely_fits_has_no_fault(declared: Any, value: Any) -> None:
    if fitting._compiled(declared)(value):
        assert fitting._fault(declared, "")(value) is None


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (float, 1),
        (int | None, None),
        (Person, {"name": "Ada", "born": None}),
        (Role, Role("lead", 1)),
        (Award, Award("best", [1999])),
        (list[Person], [{"name": "Ada", "born": 1815}]),
    ],
)
def test_what_is_usual_fits_at_once(declared: Any, value: Any) -> None:
    assert fitting._compiled(declared)(value)


def test_a_dict_of_another_class_fits_and_another_mapping_does_not() -> None:
    ada = {"name": "Ada", "born": 1815}
    assert checker(Person)(OrderedDict(ada)) is None
    assert checker(Person)(MappingProxyType(ada)) == ": expected Person, got mappingproxy"


@pytest.mark.parametrize(
    ("declared", "value", "fault"),
    [
        (list[int], [1, "2"], "[1]: expected int, got str"),
        (int, True, ": expected int, got bool"),
        (date, datetime(2026, 1, 1, tzinfo=UTC), ": expected date, got datetime"),
        (list[Person], [{"name": 1, "born": None}], "[0].name: expected str, got int"),
        (Person, {"name": "Ada"}, "Person: missing ['born'], not declared []"),
        (Person, {"name": "Ada", "born": 1, "more": 2}, "Person: missing [], not declared ['more']"),
        (Literal["a"], "b", ": expected one of ('a',)"),
    ],
)
def test_a_fault_names_its_place_and_never_the_value(declared: Any, value: Any, fault: str) -> None:
    assert checker(declared)(value) == fault


def test_a_field_that_was_added_to_one_of_a_dataclass_is_a_fault() -> None:
    role = Role("lead", 1.0)
    role.more = 1  # type: ignore[attr-defined]
    assert checker(Role)(role) == "Role: missing [], not declared ['more']"
