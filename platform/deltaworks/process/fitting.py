"""Whether a value is of its declared type: at the speed of one compiled expression, and in words where it is not.

| declared           | fits                                                       |
|--------------------|------------------------------------------------------------|
| `float`            | a float or an int, but no bool                             |
| `date`             | a date, but no datetime                                    |
| `Literal[…]`       | one of its values                                          |
| `list[T]`          | a list or tuple of what fits T                             |
| `TypedDict`        | a dict with exactly its keys, each of what fits            |
| a dataclass        | one of it, with exactly its fields, each of what fits      |
| any other class    | one of it; a bool is no int                                |
| `Any`, a union     | everything                                                 |
"""

import dataclasses
import typing
from collections.abc import Callable
from datetime import date, datetime
from itertools import count
from typing import Any

from deltaworks.process.shape import field_of, is_list, is_literal, is_record, show

Fault = Callable[[Any], str | None]
"""Where a value is not of a type, and how; `None` where it fits."""


def checker(declared: Any, *, where: str = "") -> Fault:  # Any: any declared type may be asked
    """What looks for the first place where a value is not of the declared type.

    Numbers are strict, but an int may stand for a float. The answer names the place and the two
    types, never the value.

    >>> checker(list[int])([1, "2"])
    '[1]: expected int, got str'
    """
    fault, fits = _fault(declared, where), _compiled(declared)
    return lambda value: None if fits(value) else fault(value)


# In words: where it does not fit.


def _fault(declared: Any, where: str) -> Fault:
    field = field_of(where, declared)
    inner = _inner_fault(field.type, where)
    if not field.nullable:
        return inner
    return lambda value: None if value is None else inner(value)


def _inner_fault(declared: Any, where: str) -> Fault:
    if is_literal(declared):
        allowed = typing.get_args(declared)
        return lambda value: None if value in allowed else f"{where}: expected one of {allowed!r}"
    if is_list(declared):
        return _list_fault(declared, where)
    if is_record(declared):
        return _record_fault(declared, where)
    if not isinstance(declared, type):
        return lambda value: None  # noqa: ARG005 - `Any` and the like take whatever comes.
    wanted = (float, int) if declared is float else declared

    def fault(value: Any) -> str | None:
        # A bool is an int to Python, but not to a column; a datetime is a date likewise.
        right = isinstance(value, wanted) and not (isinstance(value, bool) and declared is not bool)
        if right and not (declared is date and isinstance(value, datetime)):
            return None
        return f"{where}: expected {show(declared)}, got {type(value).__name__}"

    return fault


def _list_fault(declared: Any, where: str) -> Fault:
    item_fault = _fault(typing.get_args(declared)[0], "")

    def fault(value: Any) -> str | None:
        if not isinstance(value, list | tuple):
            return f"{where}: expected a list, got {type(value).__name__}"
        for index, item in enumerate(value):
            if (found := item_fault(item)) is not None:
                return f"{where}[{index}]{found}"
        return None

    return fault


def _record_fault(declared: Any, where: str) -> Fault:
    prefix = f"{where}." if where else "."
    checks = {name: _fault(hint, prefix + name) for name, hint in typing.get_type_hints(declared).items()}
    is_dict = typing.is_typeddict(declared)
    # Sinks take dicts; not every one of them takes another mapping.
    kind = dict if is_dict else declared

    def fault(value: Any) -> str | None:
        if not isinstance(value, kind):
            return f"{where}: expected {show(declared)}, got {type(value).__name__}"
        given = value if is_dict else vars(value) if hasattr(value, "__dict__") else _slots(value, checks)
        if given.keys() != checks.keys():
            missing, extra = sorted(checks.keys() - given.keys()), sorted(map(str, given.keys() - checks.keys()))
            return f"{where or show(declared)}: missing {missing}, not declared {extra}"
        for name, check in checks.items():
            if (found := check(given[name])) is not None:
                return found
        return None

    return fault


def _slots(value: Any, names: typing.Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


# As one expression: whether it surely fits. Where it says no, the words above decide.


def _compiled(declared: Any) -> Callable[[Any], bool]:
    """What says quickly whether a value is of the declared type; a subclass, say, is left to the slow way."""
    names: dict[str, Any] = {}
    expression = _expression(declared, "value", names, count())
    source = f"def fits(value):\n try:\n  return {expression}\n except (AttributeError, KeyError):\n  return False"
    exec(source, names)  # noqa: S102 - made of our own words; keys are quoted, and types are given by name
    fits: Callable[[Any], bool] = names["fits"]
    return fits


def _expression(declared: Any, value: str, names: dict[str, Any], numbers: typing.Iterator[int]) -> str:
    field = field_of("", declared)
    inner = _inner_expression(field.type, value, names, numbers)
    return f"({value} is None or {inner})" if field.nullable else inner


def _inner_expression(declared: Any, value: str, names: dict[str, Any], numbers: typing.Iterator[int]) -> str:
    if is_literal(declared):
        return f"({value} in {_named(typing.get_args(declared), names, numbers)})"
    if is_list(declared):
        item = f"item_{next(numbers)}"
        fits = _expression(typing.get_args(declared)[0], item, names, numbers)
        return f"((type({value}) is list or type({value}) is tuple) and all([{fits} for {item} in {value}]))"
    if is_record(declared):
        return _record_expression(declared, value, names, numbers)
    if not isinstance(declared, type):
        return "True"
    if declared is float:
        return f"(type({value}) is float or type({value}) is int)"
    return f"(type({value}) is {_named(declared, names, numbers)})"


def _record_expression(declared: Any, value: str, names: dict[str, Any], numbers: typing.Iterator[int]) -> str:
    hints = typing.get_type_hints(declared)
    if typing.is_typeddict(declared):
        parts = [f"type({value}) is dict and len({value}) == {len(hints)}"]
        parts += [_expression(hint, f"{value}[{name!r}]", names, numbers) for name, hint in hints.items()]
    else:
        parts = [f"type({value}) is {_named(declared, names, numbers)}"]
        if "__dict__" in dir(declared):
            parts.append(f"len({value}.__dict__) == {len(dataclasses.fields(declared))}")
        parts += [_expression(hint, f"{value}.{name}", names, numbers) for name, hint in hints.items()]
    return f"({' and '.join(parts)})"


def _named(thing: Any, names: dict[str, Any], numbers: typing.Iterator[int]) -> str:
    """A name under which the expression finds a thing."""
    if thing in (int, str, bool, bytes):
        return str(thing.__name__)
    name = f"thing_{next(numbers)}"
    names[name] = thing
    return name
