"""Reads `.sql` files whose statements are named: `-- name: NAME`, then the statement."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements of a file beside a package's modules, by name; read when the first one is asked for.

    >>> Statements("load.sql")["create_schema"]
    'create schema if not exists lake.deltaworks'
    """

    file: str
    package: str = "deltaworks.store"

    def __getitem__(self, name: str) -> str:
        return _read(self.package, self.file)[name]


@cache
def _read(package: str, file: str) -> Mapping[str, str]:
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], parts[1::2], strict=True)}
