"""The dbt project on a small lake: what the marts say, and that bad data fails the build."""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from deltaworks.store.lake import Lake

Dbt = Callable[..., Any]

MARTS = (
    "film",
    "films_by_decade_and_genre",
    "director_career",
    "box_office_by_distributor",
    "collaboration",
    "search_coverage",
)


def outcomes(result: Any) -> dict[str, str]:
    """Status by name of node."""
    return {item.node.name: str(item.status) for item in result.result.results}


def failed(result: Any) -> set[str]:
    return {name for name, status in outcomes(result).items() if status in ("fail", "error", "warn")}


def rows(lake: Lake, query: str) -> list[tuple[Any, ...]]:
    return lake.connection.execute(query).fetchall()


def test_a_build_passes_and_the_marts_say_what_the_films_say(small_lake: Lake, dbt: Dbt) -> None:
    result = dbt("build")
    assert result.success, failed(result)
    assert set(outcomes(result).values()) <= {"success", "pass", "no-op"}

    assert rows(
        small_lake,
        "select title, decade, genres, directors, writers, actors, tomato_rating, box_office_usd, "
        "strftime(committed_at, '%Y-%m-%d') from lake.modeled.film order by movie_id",
    ) == [
        (
            *("First Light", 1990, ["Comedy", "Drama"], ["Ada Ames"], [], ["Ada Ames", "Ben Bold"]),
            *(Decimal("7.5"), Decimal("100.50"), "2026-01-02"),
        ),
        ("Second Wind", 1990, ["Drama"], ["Ada Ames"], [], ["Ben Bold"], Decimal("5.0"), None, "2026-01-01"),
        ("Third Way", 2000, ["Drama"], ["Ada Ames"], ["Cy Cole"], [], None, None, "2026-01-01"),
        ("Fourth Draft", None, ["Drama"], ["Cy Cole"], [], [], None, None, "2026-01-01"),
        ("Fifth Column", 2000, ["War"], [], [], ["Ben Bold"], None, Decimal("7.00"), "2026-01-01"),
    ]
    assert rows(
        small_lake,
        "select decade, genre, film_count, rated_film_count, mean_tomato_rating, oscars, box_office_usd, best_film "
        "from lake.modeled.films_by_decade_and_genre order by 1, 2",
    ) == [
        (1990, "Comedy", 1, 1, Decimal("7.50"), 2, Decimal("100.50"), "First Light"),
        (1990, "Drama", 2, 2, Decimal("6.25"), 2, Decimal("100.50"), "First Light"),
        (2000, "Drama", 1, 0, None, 1, None, "Third Way"),
    ]
    assert rows(small_lake, "select * from lake.modeled.director_career") == [
        (
            *(1, "Ada Ames", 3, 1995, 2003, 2, Decimal("6.25"), 3),
            *(Decimal("100.50"), "First Light", Decimal("7.5")),
        )
    ]
    assert rows(
        small_lake,
        "select company, film_count, film_with_box_office_count, box_office_usd, top_film, first_year, last_year "
        "from lake.modeled.box_office_by_distributor order by company",
    ) == [
        ("Alpha Films Inc.", 1, 1, Decimal("100.50"), "First Light", 1999, 1999),
        ("Beta", 2, 1, Decimal("100.50"), "First Light", 1995, 1999),
    ]
    assert rows(small_lake, "select director, actor, film_count, films from lake.modeled.collaboration") == [
        ("Ada Ames", "Ben Bold", 2, ["Second Wind", "First Light"])
    ]
    assert rows(small_lake, "select * from lake.modeled.search_coverage order by status") == [
        ("draft", 1, 0),
        ("released", 3, 2),
        ("withdrawn", 1, 0),
    ]


@pytest.mark.parametrize(
    ("planted", "select", "expected"),
    [
        (
            "insert into lake.studio.movie select * from lake.studio.movie where movie_id = 1",
            "stg_movie",
            "unique_stg_",
        ),
        ("update lake.studio.movie set title = null where movie_id = 1", "stg_movie", "not_null_stg_movie_title"),
        ("update lake.studio.movie set status = 'lost' where movie_id = 1", "stg_movie", "accepted_values_stg_movie"),
        ("update lake.studio.movie set year = 1066 where movie_id = 1", "stg_movie", "in_range_stg_movie"),
        ("delete from lake.studio.movie where movie_id = 1", "stg_credit", "relationships_stg_credit_movie_id"),
        ("delete from lake.studio.person where person_id = 1", "stg_credit", "relationships_stg_credit_person_id"),
        ("insert into lake.studio.movie_genre values (1, 'Drama', 1, null)", "stg_movie_genre", "unique_together_stg_"),
        ("update lake.studio.person set name = 'Ada Ames'", "stg_person", "unique_stg_person_name"),
        ("update lake.studio.rating set tomato_rating = 10.1", "stg_rating", "in_range_stg_rating_0__10"),
        ("update lake.studio.rating set fresh = 9 where movie_id = 1", "stg_rating", "reviews_add_up"),
        ("update lake.studio.distribution set box_office_usd = -1", "stg_distribution", "in_range_stg_distribution_0"),
        ("insert into lake.movie_search.movies values (1, 'Twice')", "source:movie_search", "source_unique_"),
    ],
)
def test_bad_data_fails_the_test_that_names_it(
    small_lake: Lake, staged: None, dbt: Dbt, planted: str, select: str, expected: str
) -> None:
    small_lake.connection.execute(planted)
    result = dbt("test", "--select", select)
    assert not result.success
    assert any(name.startswith(expected) for name in failed(result)), failed(result)


def test_a_failed_test_keeps_the_mart_from_being_built_on_it(small_lake: Lake, dbt: Dbt) -> None:
    assert dbt("run", "--select", "+film").success
    small_lake.connection.execute("update lake.studio.movie set title = 'Night', status = 'lost' where movie_id = 1")
    result = dbt("build", "--select", "+film")
    assert not result.success
    assert outcomes(result)["film"] == "skipped"
    assert rows(small_lake, "select title from lake.modeled.film where movie_id = 1") == [("First Light",)]


def test_a_rebuild_leaves_pinned_views_as_they_were_and_no_table_of_its_own(small_lake: Lake, dbt: Dbt) -> None:
    assert dbt("run").success
    version = small_lake.version()
    for mart in MARTS:
        small_lake.connection.execute(
            f"create or replace view lake.prod.{mart} as select * from lake.modeled.{mart} at (version => {version})"
        )
    before = {mart: rows(small_lake, f"select * from lake.prod.{mart} order by all") for mart in MARTS}
    small_lake.connection.execute("update lake.studio.movie set title = 'Renamed', oscars = 9, status = 'released'")
    assert dbt("run").success
    assert {mart: rows(small_lake, f"select * from lake.prod.{mart} order by all") for mart in MARTS} == before
    assert rows(small_lake, "select distinct title from lake.modeled.film") == [("Renamed",)]
    tables = rows(small_lake, "select table_name from duckdb_tables() where schema_name = 'modeled'")
    assert sorted(name for (name,) in tables) == sorted(MARTS)


def test_descriptions_reach_the_docs_and_the_lake(small_lake: Lake, dbt: Dbt) -> None:
    assert dbt("run").success
    catalog = dbt("docs", "generate").result
    manifest = dbt("parse").result
    described = {
        (node.name, column.name)
        for node in manifest.nodes.values()
        for column in node.columns.values()
        if column.description
    }
    models = {id_: table for id_, table in catalog.nodes.items() if id_.startswith("model.")}
    assert len(models) == sum(node.resource_type == "model" for node in manifest.nodes.values()) == 14
    for id_, table in models.items():
        assert manifest.nodes[id_].description, id_
        assert {(manifest.nodes[id_].name, column) for column in table.columns} - described == set()
    assert rows(
        small_lake,
        "select count(*) from duckdb_columns() "
        "where database_name = 'lake' and schema_name = 'modeled' and comment is null",
    ) == [(0,)]


def test_every_model_has_an_owner_and_every_mart_is_released(small_lake: Lake, dbt: Dbt) -> None:
    manifest = dbt("parse").result
    models = [node for node in manifest.nodes.values() if node.resource_type == "model"]
    assert {node.group for node in models} == {group.name for group in manifest.groups.values()}
    released = next(exposure for exposure in manifest.exposures.values() if exposure.name == "released_views")
    marts = {node.unique_id for node in models if node.schema == "modeled"}
    assert set(released.depends_on.nodes) == marts
    assert {manifest.nodes[id_].name for id_ in marts} == set(MARTS)
    assert {str(manifest.nodes[id_].config.materialized) for id_ in marts} == {"table"}


def test_a_lake_that_is_not_there_is_an_error_and_nothing_is_created(
    lake: Lake, dbt: Dbt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAWORKS_LAKE_CATALOG", f"sqlite:{tmp_path}/nowhere/catalog.sqlite")
    result = dbt("run")
    assert not result.success
    assert "nowhere/catalog.sqlite" in json.dumps(str(result.exception or result.result))
    assert not (tmp_path / "nowhere").exists()
