"""Records out of columns: a quick way for plain dataclasses, and never past what their author wrote."""

from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa
import pytest

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.process.direct import reducer
from deltaworks.process.shape import records
from deltaworks.schema import Column, TableName, TableSchema


class Keyed(TypedDict):
    """A record of keys."""

    title: str
    year: int


@dataclass(frozen=True, slots=True)
class Slotted:
    """Whose slots are set column by column."""

    title: str
    year: int


@dataclass
class Open:
    """A dataclass of the common kind."""

    title: str
    year: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Whose fields are given by name."""

    title: str
    year: int


@dataclass(frozen=True, slots=True)
class Checked:
    """Which does more than to set its fields."""

    title: str
    year: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title.upper())


@dataclass(frozen=True, slots=True)
class Own:
    """Whose author wrote how one is made."""

    title: str
    year: int

    def __init__(self, title: str, year: int) -> None:
        object.__setattr__(self, "title", title.upper())
        object.__setattr__(self, "year", year)


COLUMNS = [["Alien", "Heat"], [1979, 1995]]


@pytest.mark.parametrize("declared", [Slotted, Open, Checked, Own])
def test_a_record_is_what_its_class_makes_of_the_values(declared: Any) -> None:
    assert list(records(declared, COLUMNS)) == [declared("Alien", 1979), declared("Heat", 1995)]
    assert list(records(declared, [[], []])) == []


def test_records_by_name_are_made_by_name() -> None:
    assert list(records(Named, COLUMNS)) == [Named(title="Alien", year=1979), Named(title="Heat", year=1995)]
    assert list(records(Keyed, COLUMNS)) == [{"title": "Alien", "year": 1979}, {"title": "Heat", "year": 1995}]


def test_an_empty_batch_has_no_wide_row() -> None:
    column = Column(name="title", type=pa.string(), source_type="text", nullable=False)
    schema = TableSchema(name=TableName("public", "film"), key=("title",), columns=(column,))
    rows = pa.RecordBatch.from_arrays(
        [
            pa.Array.from_buffers(each.type, 0, [None, None, pa.py_buffer(b"")])
            if each.type == pa.string()
            else pa.nulls(0, each.type)
            for each in change_schema(schema)
        ],
        schema=change_schema(schema),
    )
    assert reducer._is_wide(ChangeBatch(schema, rows)).tolist() == []
