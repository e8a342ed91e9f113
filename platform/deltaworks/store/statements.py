"""Reads `.sql` files whose statements are named: `-- name: NAME`, then the statement."""

import re
from collections.abc import Mapping
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def read(file: str, *, package: str = "deltaworks.store") -> Mapping[str, str]:
    """The statements of a file beside a package's modules, by name."""
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], parts[1::2], strict=True)}
