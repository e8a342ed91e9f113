"""The search index as a sink: versions, tombstones, crashes. The oracle is a dict."""

import json
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deltaworks.config import AppConfig, Config, PostgresConfig
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document
from deltaworks.store.search import SearchIndex, SearchReader, SearchWriter
from deltaworks.store.search.committed import IndexHeldError
from deltaworks.store.search.layout import SPEC_FILE, TANTIVY_FILE, IndexLayoutError
from deltaworks.store.search.read_back import SearchBackReader
from deltaworks.store.search.spec import SearchSpecError

SPEC = SearchIndex("movies", text={"title": 3.0, "cast.name": 1.0}, popularity="votes")
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def document(key: Any, position: int, title: str | None, *, ordinal: int = 0, **more: Any) -> Document:
    return Document(
        key=key,
        version=Version(Lsn(position), ordinal),
        committed_at=NOON + timedelta(seconds=position),
        body=None if title is None else {"title": title, **more},
    )


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SearchWriter]:
    writer = SearchWriter.open(tmp_path, SPEC)
    yield writer
    writer.close()


def titles(folder: Path, keys: list[Any]) -> list[str]:
    return [hit.body["title"] for hit in SearchReader(folder).documents(keys)]


def test_the_declaration_opens_a_sink_in_the_folder_of_the_app(tmp_path: Path) -> None:
    config = Config(
        home=tmp_path,
        sources={"studio": PostgresConfig(kind="postgres", dsn="host=nowhere", tables=("movie",))},  # type: ignore[arg-type]
        apps={"movie_search": AppConfig(module="studio.movie_search:movies", source="studio")},
    )
    sink = SPEC.open(app="movie_search", key="movie_id", config=config)
    sink.write([document(1, 5, "Alien")])
    sink.flush(up_to=Lsn(5))
    sink.close()
    assert sink.name == "movies"
    assert titles(config.index_folder("movie_search"), [1]) == ["Alien"]


def test_nothing_is_visible_before_the_flush(tmp_path: Path, writer: SearchWriter) -> None:
    writer.write([document(1, 5, "Alien")])
    assert titles(tmp_path, [1]) == []
    writer.flush(up_to=Lsn(5))
    assert titles(tmp_path, [1]) == ["Alien"]


def test_small_commits_are_merged(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, recent_at_most=1)
    for number in range(24):
        writer.write([document(number, 20_000 + number, "Alien")])
        writer.flush(up_to=Lsn(20_000 + number))
    writer.close()
    assert len(json.loads((tmp_path / TANTIVY_FILE).read_text())["segments"]) < 12
    assert sum(1 for _ in SearchBackReader(tmp_path).versions()) == 24


def test_a_smaller_version_is_ignored_and_an_equal_one_written_again(tmp_path: Path, writer: SearchWriter) -> None:
    writer.write([document(1, 5, "five", ordinal=1)])
    writer.write([document(1, 5, "stale", ordinal=0)])
    writer.flush(up_to=Lsn(5))
    assert titles(tmp_path, [1]) == ["five"]
    writer.write([document(1, 4, "stale", ordinal=9)])
    writer.write([document(1, 5, "five again", ordinal=1)])
    writer.flush(up_to=Lsn(5))
    assert titles(tmp_path, [1]) == ["five again"]
    writer.write([document(1, 6, "six")])
    writer.flush(up_to=Lsn(6))
    assert titles(tmp_path, [1]) == ["six"]


def test_a_late_write_does_not_bring_a_deleted_document_back(tmp_path: Path) -> None:
    for documents in (
        [document(1, 5, "Alien"), document(2, 5, "Brazil", ordinal=1)],
        [document(1, 7, None)],
        [document(1, 6, "late")],
        [document(2, 6, "Brazil, later")],
    ):
        writer = SearchWriter.open(tmp_path, SPEC)
        writer.write(documents)
        writer.flush(up_to=Lsn(7))
        writer.close()
    reader = SearchReader(tmp_path)
    assert titles(tmp_path, [1, 2]) == ["Brazil, later"]
    assert reader.search("late").total == 1
    freshness = reader.freshness()
    assert freshness is not None
    assert freshness.document_count == 1
    assert [hit.key for hit in reader.newest()] == ["2"]


def test_a_deleted_document_comes_back_with_a_newer_version(tmp_path: Path, writer: SearchWriter) -> None:
    for version, title in ((1, "Alien"), (2, None), (3, "Alien again")):
        writer.write([document(1, version, title)])
        writer.flush(up_to=Lsn(version))
    assert titles(tmp_path, [1]) == ["Alien again"]


def test_a_flush_records_what_it_reached_and_a_replay_does_not_take_it_back(
    tmp_path: Path, writer: SearchWriter
) -> None:
    writer.write([document(1, 50, "Alien")])
    writer.flush(up_to=Lsn(60))
    freshness = SearchReader(tmp_path).freshness()
    assert freshness is not None
    assert (freshness.position, freshness.committed_at) == (Lsn(60), NOON + timedelta(seconds=50))
    writer.close()
    again = SearchWriter.open(tmp_path, SPEC)
    again.write([document(1, 20, "old")])
    again.flush(up_to=Lsn(20))
    again.close()
    later = SearchReader(tmp_path).freshness()
    assert later is not None
    assert (later.position, later.committed_at) == (Lsn(60), NOON + timedelta(seconds=50))


def test_a_flush_without_documents_moves_the_position_alone(tmp_path: Path, writer: SearchWriter) -> None:
    reader = SearchReader(tmp_path)
    for position in (5, 9):
        writer.flush(up_to=Lsn(position))
        freshness = reader.freshness()
        assert freshness is not None
        assert (freshness.position, freshness.committed_at, freshness.document_count) == (Lsn(position), None, 0)


def test_values_of_a_database_become_json(tmp_path: Path, writer: SearchWriter) -> None:
    body = {"votes": Decimal("12"), "rating": Decimal("7.5"), "day": date(1979, 5, 25), "bad": float("nan")}
    writer.write([document("tt1", 1, "Alien", **body)])
    writer.flush(up_to=Lsn(1))
    (hit,) = SearchReader(tmp_path).documents(["tt1"])
    assert hit.body == {"title": "Alien", "votes": 12, "rating": 7.5, "day": "1979-05-25", "bad": None}
    assert hit.version == Version(Lsn(1), 0)


def test_a_value_without_a_json_form_is_refused_and_the_others_are_taken(tmp_path: Path, writer: SearchWriter) -> None:
    writer.write([document(1, 1, "Alien"), document(2, 1, "Brazil", what=object())])
    [refusal] = writer.flush(up_to=Lsn(1))
    assert (refusal.key, "'object'" in refusal.reason) == (2, True)
    assert titles(tmp_path, [1, 2]) == ["Alien"]
    assert writer.flush(up_to=Lsn(2)) == []


def test_a_key_too_long_to_be_found_again_is_refused(tmp_path: Path, writer: SearchWriter) -> None:
    writer.write([document("k" * 70_000, 1, "Alien")])
    [refusal] = writer.flush(up_to=Lsn(1))
    assert "shorter" in refusal.reason


def test_keys_of_any_kind_are_apart(tmp_path: Path, writer: SearchWriter) -> None:
    keys = [1, 11, "one", "a b", (1, "x"), "🎬"]
    writer.write([document(key, 1, f"film {number}") for number, key in enumerate(keys)])
    writer.write([document(1, 2, None)])
    writer.flush(up_to=Lsn(2))
    assert titles(tmp_path, keys) == [f"film {number}" for number in range(1, 6)]


# Who may write, and to what.


def test_a_second_writer_is_refused(tmp_path: Path, writer: SearchWriter) -> None:
    with pytest.raises(IndexHeldError, match="stop that one"):
        SearchWriter.open(tmp_path, SPEC)
    writer.close()
    SearchWriter.open(tmp_path, SPEC).close()


def test_an_index_of_other_paths_says_how_to_rebuild_it(tmp_path: Path, writer: SearchWriter) -> None:
    writer.close()
    other = SearchIndex("movies", text={"title": 3.0, "writers.name": 1.0}, popularity="votes")
    with pytest.raises(IndexLayoutError, match=r"cast\.name.*writers\.name.*remove"):
        SearchWriter.open(tmp_path, other)
    boosted = SearchIndex("movies", text={"title": 9.0, "cast.name": 1.0}, popularity="votes")
    SearchWriter.open(tmp_path, boosted).close()


def test_an_index_of_something_else_is_refused(tmp_path: Path, writer: SearchWriter) -> None:
    writer.close()
    (tmp_path / "index.json").unlink()
    with pytest.raises(IndexLayoutError, match="remove"):
        SearchWriter.open(tmp_path, SPEC)


def test_an_index_of_another_version_is_refused_by_all_who_open_it(tmp_path: Path, writer: SearchWriter) -> None:
    writer.write([document("a", 1, "Alien")])
    writer.flush(up_to=Lsn(1))
    writer.close()
    text = (tmp_path / SPEC_FILE).read_text()
    (tmp_path / SPEC_FILE).write_text(text.replace('"layout": 2', '"layout": 1'))
    for opening in (
        lambda: SearchWriter.open(tmp_path, SPEC),
        lambda: SearchReader(tmp_path).search("alien"),
        lambda: SearchBackReader(tmp_path),
    ):
        with pytest.raises(IndexLayoutError, match=r"layout.*1.*to rebuild it, stop the app"):
            opening()


def test_all_faults_of_a_declaration_are_reported_together() -> None:
    with pytest.raises(SearchSpecError, match=r"boost of 'title'.*no identifier"):
        SearchIndex("my movies", text={"title": 0})
    with pytest.raises(SearchSpecError, match="text is empty"):
        SearchIndex("movies", text={})


class IndexAgainstDict(RuleBasedStateMachine):
    """Writes, deletes, replays, flushes, reopens and lost writers, in any order."""

    KEYS = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.writer = SearchWriter.open(self.folder, SPEC)
        self.reader = SearchReader(self.folder)
        self.flushed: dict[int, tuple[int, str | None]] = {}
        self.written: dict[int, tuple[int, str | None]] = {}
        self.has_flushed = False

    @rule(
        batch=st.dictionaries(
            KEYS, st.tuples(st.integers(1, 8), st.none() | st.sampled_from(["Alien", "Brazil", "Cube"])), max_size=4
        )
    )
    def write(self, batch: dict[int, tuple[int, str | None]]) -> None:
        self.writer.write([document(key, version, title) for key, (version, title) in batch.items()])
        for key, (version, title) in batch.items():
            if key not in self.written or version >= self.written[key][0]:
                self.written[key] = (version, title)

    @rule()
    def flush(self) -> None:
        self.writer.flush(up_to=Lsn(8))
        self.flushed = dict(self.written)
        self.has_flushed = True

    @rule()
    def wait_for_tantivy(self) -> None:
        time.sleep(0.02)

    @rule(every_s=st.sampled_from([0.0, 0.03, 60.0]), at_most=st.sampled_from([2, 1_000]))
    def reopen(self, every_s: float, at_most: int) -> None:
        self.writer.close()
        self.writer = SearchWriter.open(self.folder, SPEC, commit_every_s=every_s, recent_at_most=at_most)
        self.written = dict(self.flushed)

    @invariant()
    def readers_see_the_last_flush(self) -> None:
        expected = {str(key): title for key, (_, title) in self.flushed.items() if title is not None}
        found = {hit.key: hit.body["title"] for hit in self.reader.documents(list(range(6)))}
        assert found == expected
        for title in ("Alien", "Brazil", "Cube"):
            keys = {hit.key for hit in self.reader.search(title).hits}
            assert keys == {key for key, has in expected.items() if has == title}
        freshness = self.reader.freshness()
        assert (freshness is not None) == self.has_flushed
        assert freshness is None or freshness.document_count == len(expected)
        assert {hit.key for hit in self.reader.newest()} == expected.keys()
        back = SearchBackReader(self.folder)
        listed = [(each.key, each.version.position.value, each.is_deleted) for each in back.versions()]
        assert sorted(listed) == sorted(
            (str(key), version, title is None) for key, (version, title) in self.flushed.items()
        )
        assert {key: body["title"] for key, body in back.documents(map(str, range(6))).items()} == expected

    def teardown(self) -> None:
        self.writer.close()
        self.temporary.cleanup()


IndexAgainstDict.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
test_the_index_is_the_newest_version_of_every_key_as_of_the_last_flush = IndexAgainstDict.TestCase
