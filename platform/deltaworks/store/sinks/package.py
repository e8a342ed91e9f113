"""Packages that only some sinks need; a plain install has none of them."""

import importlib
from typing import Any

from deltaworks.errors import TerminalError


class ExtraMissingError(TerminalError):
    """A sink needs a package that is not installed; the message names the extra that brings it."""


def needed(package: str, *, extra: str) -> Any:  # Any: a module has any names
    """Import a package that an extra of ours brings.

    Raises:
        ExtraMissingError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExtraMissingError(
            f"cannot import {package!r}, which this sink needs; install deltaworks[{extra}]"
        ) from error
