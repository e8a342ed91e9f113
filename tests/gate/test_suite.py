"""A file of suites is read whole or refused with every fault."""

from pathlib import Path

import pytest

from deltaworks.gate.suite import Expectation, Suite, SuiteFileError, load_suites

GOOD = """
suites:
  - name: movie_key
    description: Every film
      has one row.
    data: studio.movie
    expectations:
      - expect_column_values_to_be_unique: {column: movie_id}
      - expect_table_row_count_to_be_between: {min_value: 1}
  - name: orphans
    description: Every credit has its film.
    data: studio.credit
    query: select 1
    blocking: false
    expectations: [{expect_table_row_count_to_equal: {value: 0}}]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "expectations.yaml"
    path.write_text(text)
    return path


def test_suites_come_as_written(tmp_path):
    first, second = load_suites(write(tmp_path, GOOD))
    assert first == Suite(
        name="movie_key",
        description="Every film has one row.",
        data="studio.movie",
        expectations=(
            Expectation(type="expect_column_values_to_be_unique", arguments={"column": "movie_id"}),
            Expectation(type="expect_table_row_count_to_be_between", arguments={"min_value": 1}),
        ),
    )
    assert (second.query, second.is_blocking) == ("select 1", False)
    assert [expectation.column for expectation in first.expectations] == ["movie_id", None]


def test_all_faults_are_reported_together(tmp_path):
    text = """
suites:
  - just text
  - name: Bad-Name
    data: movie
    blocking: maybe
    colour: red
    expectations:
      - column_is_fine: {}
      - expect_this: 3
  - name: empty
    description: d
    data: a.b
    query: [1]
    expectations: []
"""
    with pytest.raises(SuiteFileError) as caught:
        load_suites(write(tmp_path, text))
    message = str(caught.value)
    assert "10 to mend" in message
    for part in ("suites[0]", "'colour'", "Bad-Name.name", ".description", "got 'movie'", "'maybe'", "empty.query"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "as YAML"), ("[]", "a list 'suites'"), (GOOD + GOOD[9:], "2 suites have this name")]
)
def test_what_is_no_file_of_suites_is_refused(tmp_path, text, said):
    with pytest.raises(SuiteFileError, match=said):
        load_suites(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SuiteFileError, match="nowhere"):
        load_suites(tmp_path / "nowhere.yaml")


def test_the_studio_s_own_file_is_sound():
    suites = load_suites(Path(__file__).parents[2] / "assets" / "expectations.yaml")
    assert {suite.data.partition(".")[0] for suite in suites} == {"studio", "movie_search"}
