"""Documents as changes in the app's own log."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pytest

from deltaworks.config import Config
from deltaworks.log.change_log import FencedError
from deltaworks.log.local import LocalLogReader
from deltaworks.position import Lsn, Version
from deltaworks.process.shape import ShapeError
from deltaworks.process.sink import Document
from deltaworks.store.lake_table import DocumentShapeError, LakeTable, LakeTableWriter, SameTableError

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


class Person(TypedDict):
    name: str


class Film(TypedDict):
    film_id: int
    title: str
    released_on: date | None
    tags: list[str]
    lead: Person | None
    cast: list[Person]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {"home": tmp_path, "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["film"]}}}
    )


def document(key: int, version: tuple[int, int], body: Any) -> Document:
    return Document(key=key, version=Version(Lsn(version[0]), version[1]), committed_at=MOMENT, body=body)


def film(key: int, title: str = "Alien") -> Film:
    return Film(
        film_id=key, title=title, released_on=date(1979, 5, 25), tags=["a"], lead=None, cast=[Person(name="Ada")]
    )


def rows(config: Config) -> list[list[dict[str, Any]]]:
    """The changes of each group in the app's log."""
    reader = LocalLogReader(config.log_folder("films"))
    return [
        [row for batch in group.batches for row in batch.rows.to_pylist()] for group in reader.read(after_sequence=-1)
    ]


def test_a_flush_is_one_group_with_the_documents_in_order_of_their_versions(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.write([document(2, (30, 1), film(2)), document(1, (20, 0), film(1))])
    writer.write([document(3, (30, 0), None)])
    writer.flush(up_to=Lsn(40))
    writer.close()

    [group] = rows(config)
    assert [(row["_op"], row["film_id"], row["_commit"], row["_ordinal"]) for row in group] == [
        ("u", 1, 20, 0),
        ("d", 3, 30, 0),
        ("u", 2, 30, 1),
    ]
    assert {name: group[0][name] for name in Film.__annotations__} == film(1)
    assert (group[1]["title"], group[0]["_committed_at"]) == (None, MOMENT)
    assert LocalLogReader(config.log_folder("films")).end().position == Lsn(40)


def test_a_flush_holds_each_key_once_at_its_newest_version(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.write([document(1, (20, 0), film(1, "old"))])
    writer.write([document(1, (30, 0), film(1, "new"))])
    writer.write([document(1, (10, 0), film(1, "oldest"))])
    writer.flush(up_to=Lsn(30))
    writer.close()

    assert [[row["title"] for row in group] for group in rows(config)] == [["new"]]


def test_a_flush_without_news_appends_nothing_and_one_with_a_position_only_moves_it(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.flush(up_to=Lsn(0))
    writer.flush(up_to=Lsn(10))
    writer.flush(up_to=Lsn(10))
    writer.close()

    assert rows(config) == [[]]


def test_an_app_that_starts_over_does_not_move_its_log_back(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.flush(up_to=Lsn(50))
    writer.write([document(1, (20, 0), film(1))])
    writer.flush(up_to=Lsn(20))
    writer.close()

    assert len(rows(config)[1]) == 1
    assert LocalLogReader(config.log_folder("films")).end().position == Lsn(50)


def test_what_was_written_and_not_flushed_is_not_in_the_log(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.write([document(1, (20, 0), film(1))])
    writer.close()

    assert rows(config) == []


def test_nested_types_become_lists_and_structs() -> None:
    schema = LakeTable("films", schema=Film).table_schema("film_id")

    assert schema.key == ("film_id",)
    assert {column.name: column.type for column in schema.columns} == {
        "film_id": pa.int64(),
        "title": pa.string(),
        "released_on": pa.date32(),
        "tags": pa.list_(pa.string()),
        "lead": pa.struct([("name", pa.string())]),
        "cast": pa.list_(pa.struct([("name", pa.string())])),
    }


def test_columns_may_be_given_as_arrow_types() -> None:
    schema = LakeTable("films", schema={"film_id": int, "takings": pa.decimal128(14, 2)}).table_schema("film_id")

    assert schema.column("takings").type == pa.decimal128(14, 2)


def test_a_schema_without_the_key_or_with_a_type_unheard_of_is_refused() -> None:
    with pytest.raises(DocumentShapeError, match="the app's key 'film_id' is not a column; its columns are title"):
        LakeTable("films", schema={"title": str}).table_schema("film_id")
    with pytest.raises(ShapeError, match=r"films\.title: no column is read or written as set\[str\]"):
        LakeTable("films", schema={"film_id": int, "title": set[str]}).table_schema("film_id")


def test_a_value_of_another_type_is_refused_by_its_column_and_the_others_are_taken(config: Config) -> None:
    writer = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    writer.write([document(1, (20, 0), {**film(1), "released_on": "a secret"}), document(2, (20, 1), film(2))])

    [refusal] = writer.flush(up_to=Lsn(20))

    assert (refusal.key, refusal.version) == (1, Version(Lsn(20), 0))
    assert "column 'released_on' is date32" in refusal.reason
    assert "secret" not in refusal.reason
    assert [[row["film_id"] for row in group] for group in rows(config)] == [[2]]
    writer.close()


class Score(TypedDict):
    film_id: int
    score: int


def two_tables(config: Config) -> tuple[LakeTableWriter, LakeTableWriter]:
    first = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)
    return first, LakeTable("scores", schema=Score).open_beside(first, key="film_id")


def test_tables_of_one_app_move_together_in_one_group(config: Config) -> None:
    films, scores = two_tables(config)
    films.write([document(1, (20, 0), film(1))])
    scores.write([document(1, (20, 0), {"film_id": 1, "score": 9}), document(2, (20, 1), {"film_id": 2, "score": "a"})])

    assert films.flush(up_to=Lsn(20)) == []
    [refusal] = scores.flush(up_to=Lsn(20))

    assert (refusal.key, scores.flush(up_to=Lsn(20))) == (2, [])
    [group] = LocalLogReader(config.log_folder("films")).read(after_sequence=-1)
    assert {batch.schema.name.short: len(batch) for batch in group.batches} == {"films": 1, "scores": 1}
    films.close()
    scores.close()
    # The log is let go with the last of them.
    LakeTable("films", schema=Film).open(app="films", key="film_id", config=config).close()


def test_a_refusal_that_nobody_heard_is_forgotten_when_the_document_comes_again(config: Config) -> None:
    films, scores = two_tables(config)
    scores.write([document(2, (20, 1), {"film_id": 2, "score": "a"})])
    films.flush(up_to=Lsn(20))
    scores.write([document(2, (30, 0), {"film_id": 2, "score": 8})])
    films.flush(up_to=Lsn(30))

    assert scores.flush(up_to=Lsn(30)) == []
    assert [row["score"] for group in rows(config) for row in group] == [8]
    films.close()
    scores.close()


def test_two_sinks_that_are_one_table_of_the_lake_are_refused(config: Config) -> None:
    first = LakeTable("films", schema=Film).open(app="films", key="film_id", config=config)

    with pytest.raises(SameTableError, match="'films': two sinks of the app"):
        LakeTable("public.films", schema=Score).open_beside(first, key="film_id")
    first.close()


def test_a_second_writer_is_refused(config: Config) -> None:
    table = LakeTable("films", schema=Film)
    writer = table.open(app="films", key="film_id", config=config)

    with pytest.raises(FencedError):
        table.open(app="films", key="film_id", config=config)
    writer.close()
