"""The contract of `process/sink.py`, on every sink. The oracle is a dict: per key the newest document."""

import random
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from contracts.killed import LEAVING, READING, SETTLING, lives
from contracts.sinks import NOTHING, PARAMETERS, Film, House, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaworks.errors import RetryableError
from deltaworks.position import Lsn, Version
from deltaworks.process.columns import BatchSink, DocumentBatch
from deltaworks.process.shape import arrow_type, fields_of
from deltaworks.process.sink import Document, NotReadableError, Refusal, Sink, open_reader

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(params=PARAMETERS)
def house(request: pytest.FixtureRequest, tmp_path: Path) -> House:
    return build(request.param, request, tmp_path)


def film(key: str, position: int, title: str | None, *, ordinal: int = 0, **values: Any) -> Document:
    """A film at a version; without a title it is gone."""
    return Document(
        key=key,
        version=Version(Lsn(position), ordinal),
        committed_at=NOON + timedelta(seconds=position % 1000),
        body=None if title is None else {**NOTHING, "film_id": key, "title": title, **values},
    )


def put(house: House, *writes: Sequence[Document]) -> list[Refusal]:
    """Write in turn and flush once, in a writer of its own."""
    with house.opened() as sink:
        for documents in writes:
            sink.write(documents)
        return list(sink.flush(up_to=Lsn(0)))


def write_and_flush(sink: Sink, documents: Sequence[Document]) -> None:
    sink.write(documents)
    sink.flush(up_to=Lsn(0))


def titles(house: House) -> dict[str, Any]:
    return {key: body["title"] for key, body in house.state().items()}


# Versions


def test_the_newest_wins_in_one_flush_and_over_many(house: House) -> None:
    with house.opened() as sink:
        sink.write([film("a", 1, "first"), film("b", 1, "first", ordinal=1)])
        sink.write([film("a", 2, "second")])
        sink.flush(up_to=Lsn(2))
        sink.write([film("b", 3, "third")])
        sink.flush(up_to=Lsn(3))
    assert titles(house) == {"a": "second", "b": "third"}


def test_a_stale_write_is_ignored_at_once_later_and_after_a_restart(house: House) -> None:
    put(house, [film("a", 5, "newer", ordinal=1)], [film("a", 5, "stale", ordinal=0)], [film("a", 4, "staler")])
    with house.opened() as sink:
        sink.write([film("a", 5, "stale", ordinal=0), film("b", 1, "other")])
        sink.flush(up_to=Lsn(6))
    assert titles(house) == {"a": "newer", "b": "other"}


def test_an_equal_version_is_written_again(house: House) -> None:
    for title in ("once", "once", "made anew"):
        assert put(house, [film("a", 5, title, ordinal=7)]) == []
    assert titles(house) == {"a": "made anew"}


def test_the_order_in_a_transaction_counts_after_a_document_was_made_anew(house: House) -> None:
    for ordinal in (3, 3, 3, 900_000, 900_000, 4):
        put(house, [film("a", 5, f"ordinal {ordinal}", ordinal=ordinal)])
    assert titles(house) == {"a": "ordinal 900000"}
    put(house, [film("a", 6, "next")])
    assert titles(house) == {"a": "next"}


def test_a_late_write_does_not_bring_a_deleted_document_back(house: House) -> None:
    put(house, [film("a", 5, "there"), film("b", 5, "there", ordinal=1)])
    put(house, [film("a", 7, None), film("c", 7, None, ordinal=1)])
    put(house, [film("a", 6, "late"), film("b", 6, "later"), film("c", 6, "late")])
    assert titles(house) == {"b": "later"}


def test_a_late_delete_does_not_remove_a_newer_document(house: House) -> None:
    put(house, [film("a", 5, "there")])
    put(house, [film("a", 4, None)])
    assert titles(house) == {"a": "there"}


def test_a_deleted_document_comes_back_with_a_newer_change(house: House) -> None:
    for position, title in ((1, "there"), (2, None), (2, None), (3, "again")):
        put(house, [film("a", position, title)])
    assert titles(house) == {"a": "again"}


def test_positions_as_large_as_a_servers_log_are_told_apart(house: House) -> None:
    huge = (1 << 62) + 5
    put(house, [film("a", huge, "newer", ordinal=2**31)])
    put(house, [film("a", huge - 1, "stale"), film("b", huge, "b", ordinal=2**31 + 1)])
    assert titles(house) == {"a": "newer", "b": "b"}


# Flush and restart


def test_what_was_flushed_is_there_and_what_was_only_written_is_not(house: House) -> None:
    with house.opened() as sink:
        sink.write([film("a", 1, "flushed")])
        sink.flush(up_to=Lsn(1))
        assert titles(house) == {"a": "flushed"}
        sink.write([film("b", 2, "only written")])
        assert titles(house) == {"a": "flushed"}
    assert titles(house) == {"a": "flushed"}


def test_a_flush_of_nothing_is_fine_and_so_is_a_position_that_goes_back(house: House) -> None:
    with house.opened() as sink:
        for position in (0, 9, 9, 3):
            assert list(sink.flush(up_to=Lsn(position))) == []
        sink.write([])
        assert list(sink.flush(up_to=Lsn(9))) == []
    sink.close()
    assert titles(house) == {}


@pytest.mark.parametrize("size", ["one", "many"])
def test_a_batch_of_any_size_arrives_whole(house: House, size: str) -> None:
    count = 1 if size == "one" else house.many
    documents = [film(f"film {number}", 10, f"title {number}", ordinal=number) for number in range(count)]
    assert put(house, documents) == []
    assert titles(house) == {f"film {number}": f"title {number}" for number in range(count)}


def test_the_sink_has_the_name_of_its_declaration(house: House) -> None:
    with house.opened() as sink:
        assert sink.name == house.spec.name


# Values

ODD: Mapping[str, Any] = {
    "all null": {},
    "unicode": {"title": "Ænd 🎬 \u202eright to left\u202c ‘quotes’ \"'`\\ %s {} \x01\t\n"},
    "empty": {"title": "", "tags": [], "cast": [], "poster": b""},
    "numbers": {
        "votes": -(2**63),
        "score": 1.7976931348623157e308,
        "rating": Decimal("-12345678901234567890.123456789"),
    },
    "small numbers": {"votes": 0, "score": 5e-324, "rating": Decimal("0.1"), "is_seen": False},
    "days": {"released_on": date(1, 1, 1), "updated_at": datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC)},
    "last days": {
        "released_on": date(9999, 12, 31),
        "updated_at": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    },
    "bytes": {"poster": bytes(range(256)), "is_seen": True},
    "nested": {
        "lead": {"name": "Ada 🎬", "born": None},
        "cast": [{"name": "Bo", "born": 1900}, {"name": "", "born": 0}],
    },
    "lists": {"tags": ["a", "", "a", "ü"]},
    "large": {"title": "long " * 100_000},
}


def test_odd_values_arrive_as_they_left(house: House) -> None:
    documents = [film(name, 1, "title", ordinal=number) for number, name in enumerate(ODD)]
    bodies = {document.key: {**(document.body or {}), **ODD[document.key]} for document in documents}
    written = [
        Document(key=item.key, version=item.version, committed_at=item.committed_at, body=bodies[item.key])
        for item in documents
    ]
    assert put(house, written) == []
    found = house.state()
    assert {key: found[key] for key in ODD} == {key: house.form(body) for key, body in bodies.items()}


def test_odd_keys_are_told_apart(house: House) -> None:
    keys = [
        "a",
        "A",
        "a ",
        " a",
        "ä",
        "a\u0308",
        "",
        "1",
        "01",
        "1.0",
        "🎬",
        "a/b?c#d%20",
        "a:b",
        "_a",
        "..",
        '"q"',
        "k" * 400,
    ]
    documents = [film(key, 1, f"number {number}", ordinal=number) for number, key in enumerate(keys)]
    assert put(house, documents) == []
    assert titles(house) == {key: f"number {number}" for number, key in enumerate(keys)}
    put(house, [film(key, 2, None, ordinal=number) for number, key in enumerate(keys[:-1])])
    assert titles(house) == {keys[-1]: f"number {len(keys) - 1}"}


# Columns


def as_batch(documents: Sequence[Document], **types: pa.DataType) -> DocumentBatch:
    """Documents as a vectorised app hands them over; `types` are of columns that are not as they are declared."""
    there = [document for document in documents if document.body is not None]
    gone = [document for document in documents if document.body is None]
    kinds = {item.name: types.get(item.name, arrow_type(item.type, where=item.name)) for item in fields_of(Film)}
    bodies = {name: pa.array([each.body[name] for each in there], kind) for name, kind in kinds.items()}
    return DocumentBatch(meta=_meta(there), bodies=pa.table(bodies), gone=_meta(gone))


def _meta(documents: Sequence[Document]) -> pa.Table:
    return pa.table(
        {
            "_key": pa.array([each.key for each in documents], pa.string()),
            "_commit": pa.array([each.version.position.value for each in documents], pa.uint64()),
            "_ordinal": pa.array([each.version.ordinal for each in documents], pa.uint32()),
            "_committed_at": pa.array([each.committed_at for each in documents], pa.timestamp("us", "UTC")),
        }
    )


def test_columns_arrive_as_documents_do(house: House) -> None:
    with house.opened() as sink:
        assert house.can.is_columnar == isinstance(sink, BatchSink)
    if not house.can.is_columnar:
        return
    odd = [film(name, 3, **{"title": "title", "ordinal": number, **ODD[name]}) for number, name in enumerate(ODD)]
    with house.opened() as sink:
        sink.write_batch(as_batch([film("a", 1, "old"), film("b", 1, "there", ordinal=1), *odd]))
        # The newest wins however it came, and of equal ones what came last.
        sink.write_batch(as_batch([film("b", 2, None), film("a", 2, "newer", ordinal=1)]))
        sink.write([film("a", 1, "stale", ordinal=3), film("c", 2, "first", ordinal=2)])
        sink.write_batch(as_batch([film("c", 2, "made anew", ordinal=2)]))
        assert list(sink.flush(up_to=Lsn(3))) == []
        sink.write_batch(as_batch([]))
        sink.write_batch(as_batch([film("a", 1, "late"), film("b", 1, "late")]))
        sink.flush(up_to=Lsn(3))
    found = house.state()
    assert {key: found[key]["title"] for key in ("a", "c")} == {"a": "newer", "c": "made anew"}
    assert found.keys() == {"a", "c", *(document.key for document in odd)}
    assert all(found[document.key] == house.form(document.body) for document in odd)


def test_columns_of_another_type_are_refused_one_by_one(house: House) -> None:
    if not house.can.is_columnar:
        return
    documents = [film(f"film {number}", 5, "fits", ordinal=number, votes=None) for number in range(9)]
    documents[4] = film("film 4", 5, "unfit", ordinal=4, votes="secret many")
    with house.opened() as sink:
        sink.write_batch(as_batch(documents, votes=pa.string()))
        [refusal] = sink.flush(up_to=Lsn(5))
    assert refusal.key == "film 4"
    assert "secret" not in refusal.reason
    assert len(titles(house)) == 8


# Refusals


@pytest.mark.parametrize("place", [0, 17, 99])
def test_a_refused_document_is_named_and_the_others_are_in(house: House, place: int) -> None:
    documents = [film(f"film {number}", 5, "fits", ordinal=number) for number in range(100)]
    documents[place] = film(f"film {place}", 5, "unfit", ordinal=place, **house.unfit)
    [refusal] = put(house, documents)
    assert (refusal.key, refusal.version) == (f"film {place}", Version(Lsn(5), place))
    assert refusal.reason
    assert len(titles(house)) == 99
    # The entity's next document is taken, also one that is still of the same version.
    assert put(house, [film(f"film {place}", 5, "mended", ordinal=place)]) == []
    assert titles(house)[f"film {place}"] == "mended"


def test_a_refusal_leaves_what_was_there_and_never_tells_the_value(house: House) -> None:
    put(house, [film("a", 1, "there")])
    [refusal] = put(house, [film("a", 2, "quite secret", **house.unfit)])
    assert titles(house) == {"a": "there"}
    for value in ("secret", *(str(value) for value in house.unfit.values() if isinstance(value, str))):
        assert value not in refusal.reason


# Absence


def test_nothing_counts_as_written_while_the_server_is_away(house: House) -> None:
    if house.away is None:
        return
    put(house, [film("a", 1, "before")])
    sink = house.open()
    with house.away():
        with pytest.raises(RetryableError):
            write_and_flush(sink, [film("a", 2, "during"), film("b", 2, "during", ordinal=1)])
        with pytest.raises(RetryableError):
            write_and_flush(sink, [film("c", 3, "during")])
    assert titles(house) == {"a": "before"}
    # The same writer goes on, and what it was given before comes again.
    sink.write([film("a", 2, "after"), film("b", 2, "after", ordinal=1), film("c", 3, "after")])
    assert list(sink.flush(up_to=Lsn(3))) == []
    sink.close()
    assert titles(house) == {"a": "after", "b": "after", "c": "after"}


def test_opening_while_the_server_is_away_may_be_tried_again(house: House) -> None:
    if house.away is None:
        return
    with house.away(), pytest.raises(RetryableError):
        put(house, [film("a", 1, "there")])
    put(house, [film("a", 1, "there")])
    assert titles(house) == {"a": "there"}


# Reading back


def test_versions_are_listed_with_those_of_deleted_documents(house: House) -> None:
    put(house, [film("a", 1, "there"), film("b", 1, "there", ordinal=1), film("é", 1, "there", ordinal=2)])
    put(house, [film("b", 2, None)])
    if not house.can.can_read_back:
        with pytest.raises(NotReadableError):
            open_reader(house.spec, app="films", key="film_id", config=house.config)
        return
    reader = open_reader(house.spec, app="films", key="film_id", config=house.config)
    listed = {stored.key: (stored.version, stored.is_deleted) for stored in reader.versions()}
    there = {"a": (Version(Lsn(1), 0), False), "é": (Version(Lsn(1), 2), False)}
    # A tombstone that is not kept for ever is there at first.
    assert listed == there | {"b": (Version(Lsn(2), 0), True)}
    assert reader.documents([]) == {}
    assert reader.documents(["a", "b", "nowhere"]).keys() == {"a"}
    reader.close()
    reader.close()


def test_nothing_that_is_shown_holds_a_secret(house: House) -> None:
    with house.opened() as sink:
        shown = repr((house.spec, house.config, sink, vars(sink) if hasattr(sink, "__dict__") else ""))
    assert "the-secret" not in shown


# Anything at all

KEYS = st.sampled_from("abcd")
VERSIONS = st.tuples(st.integers(1, 4), st.integers(0, 2))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.dictionaries(KEYS, st.tuples(VERSIONS, st.booleans()), max_size=4)),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("repeat"), st.none()),
    ),
    max_size=12,
)
_runs = iter(range(1_000_000))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_writes_repeats_and_restarts_end_at_the_newest(house: House, steps: list[tuple[str, Any]]) -> None:
    """Equal versions of a key hold equal documents, as the runner makes them from one state."""
    run = next(_runs)
    expected: dict[str, tuple[Version, str | None]] = {}
    pending: list[list[Document]] = []
    flushed: list[list[Document]] = []
    sink = house.open()
    for step, given_documents in [*steps, ("flush", None)]:
        if step == "write":
            documents = [
                film(f"{run} {key}", position, f"{position} {ordinal}" if is_there else None, ordinal=ordinal)
                for key, ((position, ordinal), is_there) in given_documents.items()
                for is_there in [(position * 3 + ordinal) % 4 != 0]
            ]
            sink.write(documents)
            pending.append(documents)
        elif step == "repeat" and flushed:
            # What a crash between the flush and the checkpoint does.
            sink.write(flushed[0])
            pending.append(flushed[0])
        elif step == "restart":
            sink.close()
            sink = house.open()
            pending.clear()
        elif step == "flush":
            sink.flush(up_to=Lsn(4))
            for document in (document for documents in pending for document in documents):
                held = expected.get(document.key)
                if held is None or held[0] <= document.version:
                    title = None if document.body is None else document.body["title"]
                    expected[document.key] = (document.version, title)
            flushed += pending
            pending = []
    sink.close()
    found = {key: title for key, title in titles(house).items() if key.startswith(f"{run} ")}
    assert found == {key: title for key, (_, title) in expected.items() if title is not None}


# Death

FREE, HELD = ("a", "b", "c", "d"), ("x", "y")


@pytest.mark.parametrize("keeps_rows", [False, True], ids=["direct", "with rows"])
def test_killed_at_any_step_the_sink_ends_at_the_fold_and_held_keys_stay_held(
    house: House, keeps_rows: bool, tmp_path: Path
) -> None:
    if not house.outlives:
        return
    with lives(house, tmp_path, keeps_rows=keeps_rows, seed=random.randrange(1 << 32)) as it:
        it.change([*FREE, *HELD])
        it.live()
        for step in (*READING, *LEAVING, *house.steps, *SETTLING):
            before = it.titles()
            it.change([*FREE, *HELD])
            it.live(step)
            assert_forward(before, it.titles())
        assert it.live() == "[] 0"
        assert it.titles() == it.expected

        # Their documents stay as they are from here on, whatever comes.
        settled = {key: title for key, title in it.titles().items() if key in HELD}
        it.change(HELD, poison=True)
        for step in (*LEAVING, *SETTLING):
            it.change(FREE)
            it.live(step)
            it.change(HELD, poison=True)
        for step in (*LEAVING, *SETTLING):
            assert it.live() == f"{sorted(HELD)} 0"
            assert it.titles() == {key: title for key, title in it.expected.items() if key in FREE} | settled
            it.change([*FREE])
            it.live(step)
            assert {key: title for key, title in it.titles().items() if key in HELD} == settled

        for step in (*LEAVING, *house.steps, *SETTLING):
            it.live(step, is_mended=True)
        assert it.live(is_mended=True) == "[] 0"
        assert it.titles() == it.expected


def assert_forward(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """No document went back: their titles are numbered in the order of the changes."""
    assert all(int(after[key]) >= int(title) for key, title in before.items() if key in after), (before, after)
