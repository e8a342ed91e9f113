"""Suites are checked when read, run on one version of the lake, and say why they fail without row data."""

import socket
import subprocess
import sys
import time

import pytest

from deltaworks.gate.expectation import UnusableExpectationError, run_suites
from deltaworks.gate.suite import Expectation, Suite
from deltaworks.store.lake import Lake


def make(lake: Lake, *statements: str) -> int:
    def work(connection):
        connection.execute("create schema if not exists lake.studio")
        for statement in statements:
            connection.execute(statement)

    return lake.commit(work, message="make", info=lambda _: {})[1]


@pytest.fixture
def movies(lake: Lake) -> Lake:
    make(
        lake,
        "create table lake.studio.movie as select i as movie_id, 'secret ' || i as title, 1900 + i as year,"
        " if(i = 3, null, (i / 10)::decimal(3, 1)) as mark, ['a', 'b'] as genres from range(1, 6) t(i)",
    )
    return lake


def suite(*expectations: tuple[str, dict], **options) -> Suite:
    settings = {"name": "s", "description": "d", "data": "studio.movie"} | options
    return Suite(
        expectations=tuple(Expectation(type=name, arguments=arguments) for name, arguments in expectations), **settings
    )


def test_what_holds_succeeds(movies):
    [result] = run_suites(
        movies,
        [
            suite(
                ("expect_column_values_to_be_unique", {"column": "movie_id"}),
                ("expect_column_values_to_be_between", {"column": "mark", "min_value": 0, "max_value": 10}),
                ("expect_table_row_count_to_equal", {"value": 5}),
                ("expect_table_columns_to_match_set", {"column_set": ["movie_id", "title", "year", "mark", "genres"]}),
            )
        ],
    )
    assert (result.is_success, result.failures, result.row_count) == (True, (), 5)
    assert result.version == movies.version()


def test_what_fails_says_why_in_the_suite_s_order_and_shows_no_rows(movies):
    [result] = run_suites(
        movies,
        [
            suite(
                ("expect_column_values_to_be_between", {"column": "year", "min_value": 1903}),
                ("expect_column_values_to_not_be_null", {"column": "mark"}),
                ("expect_column_values_to_be_in_set", {"column": "title", "value_set": ["secret 1"]}),
                ("expect_table_row_count_to_be_between", {"max_value": 4}),
                ("expect_column_distinct_values_to_be_in_set", {"column": "title", "value_set": ["x"]}),
            )
        ],
    )
    assert not result.is_success
    assert [r.unexpected_count for r in result.results[:3]] == [2, 1, 4]
    assert result.results[3].observed == 5
    assert (
        result.failures[0]
        == "studio.movie.year: 2 of 5 values break expect_column_values_to_be_between (min_value 1903)"
    )
    assert "secret 2" not in str(result)


def test_a_query_is_what_the_suite_looks_at(movies):
    orphans = "select * from lake.studio.movie where year > 1903"
    [result] = run_suites(movies, [suite(("expect_table_row_count_to_equal", {"value": 0}), query=orphans)])
    assert result.failures == ("studio.movie: expect_table_row_count_to_equal (value 0), found 2",)


def test_all_suites_of_a_run_see_one_version(lake_settings, movies):
    wanted = [suite(("expect_table_row_count_to_equal", {"value": 5}), name=f"s{n}") for n in range(2)]
    results = run_suites(movies, wanted)
    assert {result.version for result in results} == {movies.version()}
    with Lake.open(**lake_settings) as other:
        make(other, "delete from lake.studio.movie where movie_id = 1")
    assert run_suites(movies, wanted)[0].version == results[0].version + 1


def test_an_unknown_expectation_names_close_ones_before_anything_runs(movies):
    with pytest.raises(UnusableExpectationError, match="close ones: expect_column_values_to_be_unique"):
        run_suites(movies, [suite(("expect_column_values_to_be_uniqe", {"column": "movie_id"}))])


def test_wrong_arguments_are_listed_together(movies):
    wrong = suite(
        ("expect_column_values_to_be_unique", {}),
        ("expect_column_values_to_be_in_set", {"column": "year", "value_sets": [1]}),
    )
    with pytest.raises(UnusableExpectationError, match="2 to mend"):
        run_suites(movies, [wrong])


def test_a_missing_table_fails_its_suite_and_no_other(movies):
    unique = ("expect_column_values_to_be_unique", {"column": "movie_id"})
    gone, there = run_suites(movies, [suite(unique, data="studio.gone"), suite(unique, name="t")])
    assert "cannot read 'studio.gone'" in gone.failures[0]
    assert there.is_success


def test_a_missing_column_fails_its_expectation_and_no_other(movies):
    [result] = run_suites(
        movies,
        [
            suite(
                ("expect_column_values_to_be_unique", {"column": "imdb"}),
                ("expect_column_values_to_be_unique", {"column": "movie_id"}),
            )
        ],
    )
    assert [r.is_success for r in result.results] == [False, True]
    assert result.failures == ("'studio.movie' has no column imdb; it has movie_id, title, year, mark, genres",)


def test_large_keys_beside_nulls_stay_apart(lake):
    make(lake, f"create table lake.studio.movie as select unnest([{2**53}, {2**53 + 1}, null])::bigint as movie_id")
    [result] = run_suites(lake, [suite(("expect_column_values_to_be_unique", {"column": "movie_id"}))])
    assert result.is_success


def test_nothing_is_sent_and_nothing_printed(movies, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run_suites(movies, [suite(("expect_column_values_to_be_unique", {"column": "movie_id"}))])
    assert capfd.readouterr() == ("", "")


def test_a_quarter_million_rows_are_checked_in_seconds(lake):
    make(lake, "create table lake.studio.movie as select i as movie_id, i % 30 + 1 as billing from range(250000) t(i)")
    wanted = [
        suite(
            ("expect_column_values_to_be_unique", {"column": "movie_id"}),
            ("expect_column_values_to_not_be_null", {"column": "movie_id"}),
            ("expect_column_values_to_be_between", {"column": "billing", "min_value": 1}),
        )
    ]
    run_suites(lake, [])
    [result] = run_suites(lake, wanted)
    assert result.is_success
    assert result.took_s < 20


def test_importing_the_gate_does_not_import_great_expectations():
    code = "import sys, deltaworks.gate.expectation; print('great_expectations' in sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert time.monotonic() - started < 30
