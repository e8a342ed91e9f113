"""The proof: what is stored in it means the same for ever, and any loss or repeat shows."""

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.capture.proof import (
    NO_TRANSACTION,
    BrokenProofError,
    Chain,
    Proof,
    WindowSet,
    change_hashes,
    minute_start,
)
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
INT = pa.int64()
MASK = (1 << 64) - 1


def table(kind: pa.DataType, name: str = "movie") -> TableSchema:
    column = Column(name="id", type=kind, source_type="any", nullable=False)
    return TableSchema(name=TableName.parse(name), columns=(column,), key=("id",))


def batch(
    ids: list[Any],
    *,
    commits: list[int] | None = None,
    ordinals: list[int] | None = None,
    times: list[datetime] | None = None,
    txid: int = 7,
    kind: pa.DataType = INT,
    texts: list[dict[str, str] | None] | None = None,
    name: str = "movie",
) -> ChangeBatch:
    count = len(ids)
    schema = table(kind, name)
    rows = {
        "_op": ["u"] * count,
        "_commit": commits or [9] * count,
        "_ordinal": ordinals or list(range(count)),
        "_txid": [txid] * count,
        "_committed_at": times or [NOON] * count,
        "_unchanged": [None] * count,
        "_old_key": [None] * count,
        "_as_text": [None if text is None else list(text.items()) for text in texts or [None] * count],
        "id": ids,
    }
    return ChangeBatch(schema, pa.RecordBatch.from_pydict(rows, schema=change_schema(schema)))


# The same definition once more, one number at a time, as the module's docstring has it.


def fold(hashed: int, word: int) -> int:
    mixed = ((hashed ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def digest_of_bytes(value: bytes) -> int:
    hashed = len(value)
    for at in range(0, len(value), 8):
        hashed = fold(hashed, int.from_bytes(value[at : at + 8], "little"))
    return hashed


def change_hash(commit: int, ordinal: int, digest: int) -> int:
    return fold(fold(fold(0, commit), ordinal), digest)


def test_stored_hashes_keep_their_meaning() -> None:
    # Logs hold these numbers; if one of them changes, every log written before fails its proof.
    assert change_hashes(batch([0, -1, 2**62])).tolist() == [
        0x685964CD58E9AE17,
        0xEF94472357D6A884,
        0xD1932BC761D7F919,
    ]
    assert change_hashes(batch(["", "a", "12345678", "Amélie, 2001"], kind=pa.string())).tolist() == [
        0x685964CD58E9AE17,
        0xA7DCC1343FA8FB19,
        0xFFDC0D0178B357EC,
        0x1C286027149EE1D3,
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, MASK), st.integers(0, 2**32 - 1)), min_size=1)
)
def test_hash_of_number_keys_is_as_defined(changes: list[tuple[int, int, int]]) -> None:
    ids, commits, ordinals = (list(column) for column in zip(*changes, strict=True))
    hashes = change_hashes(batch(ids, commits=commits, ordinals=ordinals)).tolist()
    assert hashes == [change_hash(commit, ordinal, key) for key, commit, ordinal in changes]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text() | st.text(min_size=20, max_size=80), min_size=1), st.integers(0, 3))
def test_hash_of_text_keys_is_as_defined_in_slices_too(keys: list[str], skipped: int) -> None:
    whole = batch(keys, kind=pa.string())
    part = ChangeBatch(whole.schema, whole.rows.slice(min(skipped, len(keys) - 1)))
    expected = [change_hash(9, place, digest_of_bytes(key.encode())) for place, key in enumerate(keys)]
    assert change_hashes(part).tolist() == expected[len(keys) - len(part) :]


@pytest.mark.parametrize(
    ("kind", "value", "digest"),
    [
        (pa.int16(), -3, -3),
        (pa.int32(), 70_000, 70_000),
        (pa.bool_(), True, 1),
        (pa.float64(), 1.0, 0x3FF0000000000000),
        (pa.float32(), 1.0, 0x3FF0000000000000),
        (pa.date32(), date(1970, 1, 3), 2),
        (pa.timestamp("us", "UTC"), datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), 1_000_000),
        (pa.time64("us"), timedelta(seconds=2), 2_000_000),
        (pa.binary(), b"\x00\xff", digest_of_bytes(b"\x00\xff")),
        (pa.decimal128(10, 2), Decimal("-1.50"), fold(fold(16, -150), -1)),
        (pa.list_(pa.int64()), [5, 6], fold(fold(2, 5), 6)),
        (pa.list_(pa.string()), [None, "a"], fold(fold(2, 0x6E756C6C), digest_of_bytes(b"a"))),
        (pa.list_(pa.int64()), [], 0),
        (pa.int64(), None, 0x6E756C6C),
    ],
)
def test_every_kind_of_key_has_its_digest(kind: pa.DataType, value: object, digest: int) -> None:
    if isinstance(value, timedelta):
        value = (datetime(1970, 1, 1) + value).time()  # noqa: DTZ001  # a time of day has no zone
    doubled = batch([value, value], kind=kind)
    for first in range(2):
        sliced = ChangeBatch(doubled.schema, doubled.rows.slice(first, 1))
        assert change_hashes(sliced).tolist() == [change_hash(9, first, digest)]


def test_a_key_that_stands_as_text_is_told_from_another_one() -> None:
    keys = [None, None, 4]
    texts = [{"id": "infinity"}, {"id": "-infinity"}, {"other": "NaN"}]
    hashes = change_hashes(batch(keys, texts=texts)).tolist()
    digests = [digest_of_bytes(b"infinity"), digest_of_bytes(b"-infinity"), 4]
    assert hashes == [change_hash(9, place, digest) for place, digest in enumerate(digests)]


changes = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 9), st.integers(0, 5), st.integers(0, 300), st.sampled_from("ab")),
    # A change has one time: two that differ in nothing else are not two.
    unique_by=lambda change: (change[0], change[1], change[2], change[4]),
)


def batches_of(found: list[tuple[int, int, int, int, str]]) -> list[ChangeBatch]:
    return [
        batch([key], commits=[commit], ordinals=[ordinal], times=[NOON + timedelta(seconds=second)], name=name)
        for key, commit, ordinal, second, name in found
    ]


@settings(max_examples=40, deadline=None)
@given(changes, changes)
def test_sets_merge_and_subtract_like_the_changes_they_are_of(one: list[Any], other: list[Any]) -> None:
    both = WindowSet.of([*batches_of(one), *batches_of(other)])
    ones, others = WindowSet.of(batches_of(one)), WindowSet.of(batches_of(other))
    assert ones.merge(others) == both == others.merge(ones)
    assert both.subtract(others) == ones
    assert WindowSet.of(batches_of(one[::-1])) == ones
    assert WindowSet.from_json(json.loads(json.dumps(both.to_json()))) == both


@settings(max_examples=40, deadline=None)
@given(changes.filter(bool), st.data())
def test_any_lost_doubled_or_exchanged_change_shows(found: list[Any], data: st.DataObject) -> None:
    whole = WindowSet.of(batches_of(found))
    victim = data.draw(st.sampled_from(found))
    without = [change for change in found if change != victim]
    assert WindowSet.of(batches_of(without)) != whole
    assert WindowSet.of(batches_of([*found, victim])) != whole
    if without:
        # The count stays the same: only sum and xor see it.
        assert WindowSet.of(batches_of([*without, data.draw(st.sampled_from(without))])) != whole
    key, *rest = victim
    assert WindowSet.of(batches_of([*without, (key + 100, *rest)])) != whole


def test_changes_fall_into_the_minute_of_their_commit() -> None:
    times = [NOON, NOON + timedelta(seconds=59.999999), NOON + timedelta(seconds=60), NOON - timedelta(microseconds=1)]
    found = WindowSet.of([batch([1, 2, 3, 4], times=times)]).windows
    assert {minute_start(minute).isoformat(): window.count for (_table, minute), window in found.items()} == {
        "2026-05-01T11:59:00+00:00": 1,
        "2026-05-01T12:00:00+00:00": 2,
        "2026-05-01T12:01:00+00:00": 1,
    }


def test_a_chain_links_each_transaction_to_the_one_before() -> None:
    people = batch([3, 4], commits=[20, 30], name="person")
    chain = NO_TRANSACTION.after([batch([1, 2, 3], commits=[10, 10, 30]), people])
    digest = fold(fold(fold(0, 0), 10), 1) + fold(fold(fold(0, 10), 20), 2) + fold(fold(fold(0, 20), 30), 3)
    assert chain == Chain(position=Lsn(30), count=3, digest=digest & MASK)
    assert Chain.from_json(json.loads(json.dumps(chain.to_json()))) == chain


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), unique=True, min_size=2), st.data())
def test_a_chain_is_the_same_in_whatever_groups_and_shows_a_missing_transaction(
    commits: list[int], data: st.DataObject
) -> None:
    commits.sort()
    whole = NO_TRANSACTION.after([batch(commits, commits=commits)])
    at = data.draw(st.integers(1, len(commits) - 1))
    # A transaction may go on in the next group.
    first, second = batch(commits[: at + 1], commits=commits[: at + 1]), batch(commits[at:], commits=commits[at:])
    assert NO_TRANSACTION.after([first]).after([second]) == whole
    missing = commits[:at] + commits[at + 1 :]
    assert NO_TRANSACTION.after([batch(missing, commits=missing)]) != whole


def test_reads_of_a_dump_are_in_the_windows_and_not_in_the_chain() -> None:
    proof = Proof.of([batch([1], commits=[8]), batch([2, 3], commits=[9, 9], txid=0)], after=NO_TRANSACTION)
    assert proof.windows.counts == {"public.movie": 3}
    assert (proof.chain.count, proof.chain.position) == (1, Lsn(8))


def test_a_transaction_before_the_last_one_is_refused() -> None:
    chain = NO_TRANSACTION.after([batch([1], commits=[0x30])])
    with pytest.raises(BrokenProofError, match=r"after the transaction at 0/30: the next one is at 0/20"):
        chain.after([batch([1], commits=[0x20])])


def test_a_stream_that_counted_other_transactions_than_it_gave_is_refused() -> None:
    two = [batch([1, 2], commits=[8, 9])]
    assert Proof.of(two, after=NO_TRANSACTION, transaction_count=2).chain.count == 2
    with pytest.raises(BrokenProofError, match="the stream ended 3 transactions, 2 have changes"):
        Proof.of(two, after=NO_TRANSACTION, transaction_count=3)


@pytest.mark.parametrize("last", [[batch([3], commits=[40])], []])
def test_a_transaction_of_many_groups_is_in_the_chain_once(last: list[ChangeBatch]) -> None:
    before = NO_TRANSACTION.after([batch([0], commits=[10])])
    first = Proof.of([batch([1], commits=[40])], after=before)
    second = Proof.of([batch([2], commits=[40])], after=first.chain)
    third = Proof.of(last, after=second.chain)
    assert (first.chain.count, third.chain) == (2, first.chain)


def test_a_proof_without_changes_is_empty_and_keeps_the_chain() -> None:
    chain = Chain(position=Lsn(5), count=3, digest=9)
    proof = Proof.of([], after=chain)
    assert proof == Proof(windows=WindowSet(), chain=chain)
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof
