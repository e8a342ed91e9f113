"""Named steps at which a test can make the engine fail.

Code calls `reach("log.after_write")` where dying would be interesting. Nothing happens unless
`deltaworks.testing` armed that name in this process.
"""

from collections.abc import Callable

_armed: dict[str, Callable[[], None]] = {}


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
