"""Named steps at which a test can make the engine fail.

Code calls `reach("log.after_write")` where dying would be interesting. Nothing happens unless
`deltaworks.testing` armed that name in this process.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

_armed: dict[str, Callable[[], None]] = {}
_armed_handovers: dict[str, Callable[[Any], Any]] = {}  # Any: whatever is handed over there


def reach(name: str) -> None:
    """Pass the named step; a no-op outside of tests."""
    if _armed and (action := _armed.get(name)) is not None:
        action()


def arm(name: str, action: Callable[[], None]) -> None:
    """Run `action` whenever the named step is reached, until `disarm`."""
    _armed[name] = action


def disarm() -> None:
    """Forget every armed step."""
    _armed.clear()
    _armed_handovers.clear()


def hand_over(name: str, value: T) -> T:
    """Pass a value from one hop to the next at a named place; a test may take some of it away there."""
    if _armed_handovers and (change := _armed_handovers.get(name)) is not None:
        return cast(T, change(value))
    return value


def arm_handover(name: str, change: Callable[[Any], Any]) -> None:  # Any: whatever is handed over there
    """Put `change(value)` in the place of what is handed over at the named place, until `disarm`."""
    _armed_handovers[name] = change
