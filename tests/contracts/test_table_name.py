"""A table's full name as text: written, and read back as the same name, whatever is in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.schema import TableName

parts = st.text('a."x é', min_size=1, max_size=6)


@given(parts, parts)
def test_a_name_is_read_back_as_it_was_written(namespace: str, name: str) -> None:
    written = TableName(namespace, name)
    assert TableName.parse(str(written)) == written


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("movie", TableName("public", "movie")),
        ("sales.order", TableName("sales", "order")),
        ("sales.order.old", TableName("sales", "order.old")),
        ('"S.x"."T ""q"" é"', TableName("S.x", 'T "q" é')),
    ],
)
def test_a_name_is_read_as_people_write_it(text: str, name: TableName) -> None:
    assert TableName.parse(text) == name
