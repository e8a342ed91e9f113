"""What a process that only captures keeps out of its memory."""

import sys
from importlib.abc import MetaPathFinder

import pyarrow as pa


def leave_pandas_out() -> None:
    """Keep Arrow from importing pandas: 36 MB and half a second that capture has no use for.

    Arrow looks for pandas once, at its first array, to know arguments of pandas' types when it sees them. It
    is told here that there is none. Where pandas was imported before, nothing changes; it can still be imported
    after, but `to_pandas` of Arrow no longer works. So this is for the capture service, which runs no code of users.
    """
    if "pandas" in sys.modules:
        return
    refusal = _NoPandas()
    sys.meta_path.insert(0, refusal)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(refusal)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, *_: object) -> None:
        """Refuse pandas, and leave all else to the finders behind this one."""
        if fullname == "pandas":
            raise ModuleNotFoundError(f"no module named {fullname!r} while Arrow looks for it", name=fullname)
