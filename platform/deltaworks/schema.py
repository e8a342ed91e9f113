"""What a table looks like: the one description shared by capture, log, process and store."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

_PART = re.compile(r'(?:"((?:[^"]|"")+)"|([^."]+))(?:\.(?!$)|$)')

AS_TEXT = pa.field("_as_text", pa.map_(pa.string(), pa.string()))
"""Beside a row's columns: column name to the source's own text of a value that the column's Arrow type cannot hold.

The column itself is null there. So a NaN in `numeric(10,2)`, an infinite date, a year outside of 1 to 9999 or an
array of two dimensions is neither changed nor lost. Null, never empty, in a row whose columns hold everything.
Text that is not UTF-8 (a server without an encoding) stands here as its bytes: `\\x` and two digits for each.
"""


def texts_by_column(rows: pa.RecordBatch | pa.Table) -> dict[str, dict[int, str]]:
    """What the `_as_text` of rows or changes says: the texts by column and row, nothing where there are none."""
    column = rows.column(AS_TEXT.name)
    if column.null_count == len(column):
        return {}
    places = pc.indices_nonzero(column.is_valid())
    found: dict[str, dict[int, str]] = {}
    for row, texts in zip(places.to_pylist(), column.take(places).to_pylist(), strict=True):
        for name, text in texts:
            found.setdefault(name, {})[row] = text
    return found


@dataclass(frozen=True, slots=True, order=True)
class TableName:
    """A table's full name in its source.

    >>> TableName.parse("movie")
    TableName(namespace='public', name='movie')
    >>> str(TableName.parse("sales.order"))
    'sales.order'
    >>> TableName.parse('"a.b".c')
    TableName(namespace='a.b', name='c')
    """

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name` or `namespace.name`; the namespace is `public` when it is left out.

        A part that has a dot or a double quote in it stands in double quotes, which are doubled inside.
        """
        parts = _unquoted(text)
        if not 1 <= len(parts) <= 2:
            # Not written in quotes: the first dot parts the two, as in a name that only its table has dots in.
            parts = text.split(".", 1)
        return cls(parts[0], parts[1]) if len(parts) == 2 else cls("public", parts[0])

    @property
    def short(self) -> str:
        """The name in lake, assets and apps: bare in `public`, `namespace__name` elsewhere."""
        return self.name if self.namespace == "public" else f"{self.namespace}__{self.name}"

    def __str__(self) -> str:
        return f"{_quoted(self.namespace)}.{_quoted(self.name)}"


@dataclass(frozen=True, slots=True)
class TablePattern:
    """Tables by what their names look like: `*` stands for any letters, none included.

    >>> TablePattern.parse("order_*").holds(TableName.parse("order_line"))
    True
    >>> TablePattern.parse("shop.*").holds(TableName.parse("public.shop"))
    False
    """

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name as `TableName.parse` does, with `*` in it."""
        parsed = TableName.parse(text)
        return cls(parsed.namespace, parsed.name)

    def holds(self, name: TableName) -> bool:
        """Whether a table of that name is meant."""
        return _is_like(name.namespace, self.namespace) and _is_like(name.name, self.name)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


def is_pattern(text: str) -> bool:
    """Whether a table in the configuration is written as a pattern; in double quotes a `*` is a letter like any other.

    >>> is_pattern("order_*"), is_pattern('"order_*"')
    (True, False)
    """
    return "*" in re.sub(r'"(?:[^"]|"")*"', "", text)


def _is_like(text: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


def _quoted(part: str) -> str:
    needs_quotes = "." in part or '"' in part or not part
    return '"' + part.replace('"', '""') + '"' if needs_quotes else part


def _unquoted(text: str) -> list[str]:
    """The parts of a name between its dots, without their quotes; none where the text does not fit."""
    matches = list(_PART.finditer(text))
    if "".join(match.group(0) for match in matches) != text:
        return []
    return [bare if quoted is None else quoted.replace('""', '"') for quoted, bare in map(re.Match.groups, matches)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column as Arrow holds it.

    `source_type` is the source's own spelling (`numeric(10,2)`, `film_status`); it says what the
    Arrow type alone cannot, for example that a text is an enum.
    """

    name: str
    type: pa.DataType
    source_type: str
    nullable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSchema:
    """A table's columns in their order, and its key.

    `key` is empty for a table without one, whose rows are a bag: see `deltaworks.change`.
    """

    name: TableName
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    has_before: bool = False
    """Whether the source sends the whole row before an update or a delete (PostgreSQL: replica identity full)."""

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            KeyError: no such column; the message lists those that are.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"no column {name!r} in {self.name}; it has {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in the table's order."""
        return tuple(column.name for column in self.columns)

    def row_schema(self) -> pa.Schema:
        """The Arrow schema of rows as they are read: `_as_text`, then the columns."""
        return self.to_arrow(before=(AS_TEXT,))

    def to_arrow(self, before: Iterable[pa.Field] = ()) -> pa.Schema:
        """An Arrow schema with `before`, then the columns; `from_arrow` reads it back exactly."""
        fields = [
            # A delete carries the key alone, so no field of a change is declared NOT NULL in Arrow.
            pa.field(
                column.name,
                column.type,
                metadata={"source_type": column.source_type, "nullable": str(int(column.nullable))},
            )
            for column in self.columns
        ]
        return pa.schema(
            [*before, *fields],
            metadata={
                "deltaworks.table": str(self.name),
                "deltaworks.key": json.dumps(self.key),
                **({"deltaworks.before": "1"} if self.has_before else {}),
            },
        )

    @classmethod
    def from_arrow(cls, schema: pa.Schema) -> Self:
        """Read what `to_arrow` wrote; fields without `source_type` (the meta columns) are left out."""
        metadata = schema.metadata
        return cls(
            name=TableName.parse(metadata[b"deltaworks.table"].decode()),
            key=tuple(json.loads(metadata[b"deltaworks.key"])),
            has_before=b"deltaworks.before" in metadata,
            columns=tuple(
                Column(
                    name=field.name,
                    type=field.type,
                    source_type=field.metadata[b"source_type"].decode(),
                    nullable=field.metadata[b"nullable"] == b"1",
                )
                for field in schema
                if field.metadata and b"source_type" in field.metadata
            ),
        )
