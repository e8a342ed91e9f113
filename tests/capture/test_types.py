from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.capture.postgres.types import TypeFacts, arrow_type, parse_array, to_arrow


def facts(base: str | None, modifier: int = -1, *, is_array: bool = False) -> TypeFacts:
    return TypeFacts(source_type="as the server says", base=base, modifier=modifier, is_array=is_array)


def numeric(precision: int, scale: int) -> TypeFacts:
    """With the modifier as numeric.c makes it."""
    return facts("numeric", (precision << 16 | scale & 0x7FF) + 4)


@pytest.mark.parametrize(
    ("type_facts", "expected"),
    [
        (numeric(10, 2), pa.decimal128(10, 2)),
        (numeric(38, 38), pa.decimal128(38, 38)),
        (numeric(39, 0), pa.string()),
        (numeric(3, -2), pa.decimal128(5, 0)),
        (numeric(3, 5), pa.decimal128(5, 5)),
        (facts("numeric"), pa.string()),
        (facts(None), pa.string()),
        (facts("uuid"), pa.string()),
        (facts("int4", is_array=True), pa.list_(pa.int32())),
        (facts(None, is_array=True), pa.list_(pa.string())),
    ],
)
def test_type_holds_every_value_exactly(type_facts: TypeFacts, expected: pa.DataType) -> None:
    assert arrow_type(type_facts) == expected


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (b"t", pa.bool_(), True),
        (b"f", pa.bool_(), False),
        (b"-32768", pa.int16(), -32768),
        (b"9223372036854775807", pa.int64(), 9223372036854775807),
        (b"-Infinity", pa.float64(), float("-inf")),
        (b"1e-45", pa.float32(), 1.401298464324817e-45),
        (b"-0.05", pa.decimal128(10, 2), Decimal("-0.05")),
        (b"0044-03-15", pa.date32(), date(44, 3, 15)),
        (b"2020-01-01 00:00:00.1", pa.timestamp("us"), datetime(2020, 1, 1, 0, 0, 0, 100000)),  # noqa: DTZ001
        (b"9999-12-31 23:59:59.999999+00", pa.timestamp("us", "UTC"), datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)),
        (rb"\x00ff", pa.binary(), b"\x00\xff"),
        (b"{}", pa.list_(pa.int32()), []),
        (b"{t,NULL,f}", pa.list_(pa.bool_()), [True, None, False]),
        (rb'{"\\x00ff",NULL}', pa.list_(pa.binary()), [b"\x00\xff", None]),
        (b'{"2020-01-01 00:00:00+00"}', pa.list_(pa.timestamp("us", "UTC")), [datetime(2020, 1, 1, tzinfo=UTC)]),
    ],
)
def test_text_reads_as_its_value(text: bytes, kind: pa.DataType, value: object) -> None:
    held = to_arrow([text, None], kind)
    assert (held.array.to_pylist(), held.texts) == ([value, None], {})


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int32(), pa.binary(), pa.list_(pa.string()), pa.timestamp("us")])
def test_no_rows_are_an_empty_column(kind: pa.DataType) -> None:
    assert to_arrow([], kind).array.equals(pa.array([], kind))


@pytest.mark.parametrize(
    ("text", "ordinary", "kind"),
    [
        (b"infinity", b"2020-01-01", pa.date32()),
        (b"-infinity", b"2020-01-01 00:00:00+00", pa.timestamp("us", "UTC")),
        (b"10000-01-01", b"9999-12-31", pa.date32()),
        (b"0044-03-15 BC", b"0044-03-15", pa.date32()),
        (b"0044-03-15 00:00:00+00 BC", b"0044-03-15 00:00:00+00", pa.timestamp("us", "UTC")),
        (b"294276-12-31 23:59:59.999999", b"2020-01-01 00:00:00.000001", pa.timestamp("us")),
        (b"NaN", b"-0.10", pa.decimal128(10, 2)),
        (b"{{1,2},{3,4}}", b"{1,2}", pa.list_(pa.int32())),
        (b"[0:1]={1,2}", b"{}", pa.list_(pa.int32())),
        (b"{infinity}", b"{2020-01-01}", pa.list_(pa.date32())),
        (b"{1.10,NaN}", b"{1.10,NULL}", pa.list_(pa.decimal128(6, 2))),
        (b"maybe", b"t", pa.bool_()),
        (b"2147483648", b"2147483647", pa.int32()),
    ],
)
def test_value_that_arrow_cannot_hold_is_its_text(text: bytes, ordinary: bytes, kind: pa.DataType) -> None:
    held = to_arrow([None, text, ordinary, text], kind)
    assert held.array.is_null().to_pylist() == [True, True, False, True]
    assert held.texts == {1: text.decode(), 3: text.decode()}
    assert held.array.slice(2).equals(to_arrow([ordinary, None], kind).array)


def test_text_that_is_not_utf8_is_the_digits_of_its_bytes() -> None:
    held = to_arrow([b"plain", b"\xff\x00", None], pa.string())
    assert (held.array.to_pylist(), held.texts) == (["plain", None, None], {1: r"\xff00"})


def test_arrow_text_reads_as_the_same_column() -> None:
    texts = [b"1.50", None, b"NaN"]
    for kind in (pa.string(), pa.binary()):
        held = to_arrow(pa.array(texts, pa.binary()).cast(kind), pa.decimal128(5, 2))
        assert (held.array.to_pylist(), held.texts) == ([Decimal("1.50"), None, None], {2: "NaN"})


@given(st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))))
def test_array_is_read_as_it_was_quoted(items: list[str | None]) -> None:
    quoted = ["NULL" if item is None else '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"' for item in items]
    assert parse_array("{" + ",".join(quoted) + "}") == items


@given(st.lists(st.none() | st.binary(max_size=20), max_size=8), st.integers(0, 3))
def test_bytes_are_those_of_their_digits(values: list[bytes | None], start: int) -> None:
    texts = pa.array([None if value is None else "\\x" + value.hex() for value in values], pa.string())
    held = to_arrow(texts.slice(start), pa.binary())
    held.array.validate(full=True)
    assert (held.array.to_pylist(), held.texts) == (values[start:], {})


@pytest.mark.parametrize("text", ["", "00", r"\x0", r"\xzz", r"\x00 11"])
def test_text_that_is_no_digits_of_bytes_is_kept(text: str) -> None:
    held = to_arrow([r"\x61", text], pa.binary())
    assert (held.array.to_pylist(), held.texts) == ([b"a", None], {1: text})


plain_words = st.text("abcXYZ019-.", min_size=1, max_size=4).filter(lambda word: word.upper() != "NULL")
words = plain_words | st.text(max_size=4).filter(lambda word: "\0" not in word and word.isprintable())


@given(st.lists(st.none() | st.lists(st.none() | plain_words) | st.lists(st.none() | words), max_size=5))
def test_column_of_arrays_is_read_as_each_array_is(arrays: list[list[str | None] | None]) -> None:
    texts = pa.array([None if items is None else array_text(items) for items in arrays], pa.string())
    held = to_arrow(texts, pa.list_(pa.string()))
    held.array.validate(full=True)
    assert (held.array.to_pylist(), held.texts) == (arrays, {})


def array_text(items: list[str | None]) -> str:
    """An array as the server writes it, with quotes only where they must be."""
    return "{" + ",".join("NULL" if item is None else element_text(item) for item in items) + "}"


def element_text(item: str) -> str:
    if item and item.upper() != "NULL" and not set(item) & set('{},"\\ ') and not item.isspace():
        return item
    return '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"'
