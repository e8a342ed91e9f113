"""Column lineage of a SELECT."""

from deltaworks.lineage.sql import column_lineage

FILM = ("lake", "studio", "film")
CREDIT = ("lake", "studio", "credit")
RELATIONS = {FILM: ["film_id", "title", "year"], CREDIT: ["film_id", "name", "role"]}


def lineage_of(statement: str, *outputs: str) -> dict[str, set[str]]:
    found = column_lineage(statement, relations=RELATIONS, outputs=outputs)
    assert not found.is_guess
    return {column: {f"{relation[2]}.{name}" for relation, name in pairs} for column, pairs in found.columns.items()}


def test_a_column_leads_through_subqueries_and_joins_to_its_table() -> None:
    statement = """
        with named as (select film_id, upper(name) as who from lake.studio.credit where role = 'director')
        select f.title || ' by ' || who as label, f.year + 1 as next_year, count(*) over () as rows
        from lake.studio.film f join named using (film_id)
    """
    assert lineage_of(statement, "label", "next_year", "rows") == {
        "label": {"film.title", "credit.name"},
        "next_year": {"film.year"},
        "rows": set(),
    }


def test_a_star_is_every_column_by_name() -> None:
    assert lineage_of("select * from lake.studio.film", "title") == {"title": {"film.title"}}


def test_a_union_takes_from_both_sides() -> None:
    statement = "select title from lake.studio.film union all select name from lake.studio.credit"
    assert lineage_of(statement, "title") == {"title": {"film.title", "credit.name"}}


def test_what_cannot_be_parsed_is_all_columns_of_all_inputs_and_says_so() -> None:
    found = column_lineage("from from lake.studio.film ((", relations=RELATIONS, outputs=["x"])
    assert found.is_guess
    assert found.columns["x"] == {(FILM, "film_id"), (FILM, "title"), (FILM, "year")}
