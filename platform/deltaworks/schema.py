"""What a table looks like: the one description shared by capture, log, process and store."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import pyarrow as pa


@dataclass(frozen=True, slots=True, order=True)
class TableName:
    """A table's full name in its source.

    >>> TableName.parse("movie")
    TableName(namespace='public', name='movie')
    >>> str(TableName.parse("sales.order"))
    'sales.order'
    """

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name` or `namespace.name`; the namespace is `public` when it is left out."""
        namespace, dot, name = text.partition(".")
        return cls(namespace, name) if dot else cls("public", namespace)

    @property
    def short(self) -> str:
        """The name in lake, assets and apps: bare in `public`, `namespace__name` elsewhere."""
        return self.name if self.namespace == "public" else f"{self.namespace}__{self.name}"

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


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

    `key` is never empty for a table that can be captured. `Source.check` reports tables without one.
    """

    name: TableName
    columns: tuple[Column, ...]
    key: tuple[str, ...]

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
            metadata={"deltaworks.table": str(self.name), "deltaworks.key": json.dumps(self.key)},
        )

    @classmethod
    def from_arrow(cls, schema: pa.Schema) -> Self:
        """Read what `to_arrow` wrote; fields without `source_type` (the meta columns) are left out."""
        metadata = schema.metadata
        return cls(
            name=TableName.parse(metadata[b"deltaworks.table"].decode()),
            key=tuple(json.loads(metadata[b"deltaworks.key"])),
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
