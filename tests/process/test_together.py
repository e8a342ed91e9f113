"""Many small batches as few: every change is there once, and those of a table stay in their order."""

import itertools

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.change import ChangeBatch, change_schema, together
from deltaworks.schema import Column, TableName, TableSchema


def table(name: str, *, is_wider: bool = False) -> TableSchema:
    key = Column(name="id", type=pa.int64(), source_type="bigint", nullable=False)
    more = Column(name="more", type=pa.string(), source_type="text", nullable=True)
    return TableSchema(name=TableName.parse(name), columns=(key, more) if is_wider else (key,), key=("id",))


def batch(schema: TableSchema, ids: list[int]) -> ChangeBatch:
    rows = [{"_op": "u", "_commit": number, "_ordinal": 0, "_txid": 1, "id": number} for number in ids]
    return ChangeBatch(schema, pa.RecordBatch.from_pylist(rows, schema=change_schema(schema)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["film", "person"]), st.booleans(), st.integers(1, 3)), max_size=30))
def test_a_tables_changes_stay_in_order_and_of_their_schema(kinds: list[tuple[str, bool, int]]) -> None:
    given_, count = [], 0
    for name, is_wider, size in kinds:
        given_.append(batch(table(name, is_wider=is_wider), list(range(count, count + size))))
        count += size

    joined = together(given_)

    for name in ("film", "person"):
        of_table = [each for each in given_ if each.schema == table(name) or each.schema == table(name, is_wider=True)]
        found = [each for each in joined if each.schema.name == TableName.parse(name)]
        before = [(each.schema, number) for each in of_table for number in each.rows.column("id").to_pylist()]
        after = [(each.schema, number) for each in found for number in each.rows.column("id").to_pylist()]
        assert after == before
        assert all(one.schema != next_.schema for one, next_ in itertools.pairwise(found))
