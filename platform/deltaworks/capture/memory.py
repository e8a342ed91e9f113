"""What a process that only captures keeps out of its memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder

import pyarrow as pa


def leave_pandas_out() -> None:
    """Keep Arrow from importing pandas: 36 MB and half a second that capture has no use for.

    Arrow looks for pandas once, at its first array, to know arguments of pandas' types when it sees them. It
    is told here that there is none. Where pandas was imported before, nothing changes; it can still be imported
    after, but `to_pandas` of Arrow no longer works. So this is for the capture service, which runs no code of users.
    """
    with refused("pandas"):
        pa.array([0])


@contextmanager
def refused(module: str) -> Iterator[None]:
    """Let no import of a module succeed inside; nothing changes where it was imported before."""
    if module in sys.modules:
        yield
        return
    refusal = _Refusal(module)
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


class _Refusal(MetaPathFinder):
    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, fullname: str, *_: object) -> None:
        """Refuse one module, and leave all else to the finders behind this one."""
        if fullname == self._module:
            raise ModuleNotFoundError(f"no module named {fullname!r} while it is left out", name=fullname)
