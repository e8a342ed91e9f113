"""The catalogue is the file's content, no more and no less; the file itself is the oracle."""

import re
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from studio import catalogue
from studio.catalogue import COLUMNS, Catalogue, CatalogueError, names, read


@pytest.fixture(scope="module")
def films() -> Catalogue:
    return read()


@pytest.fixture(scope="module")
def source() -> dict[int, sqlite3.Row]:
    with closing(sqlite3.connect(catalogue.default_path())) as connection:
        connection.row_factory = sqlite3.Row
        return {row["ID"]: row for row in connection.execute("select * from omdb join tomatoes using (ID)")}


def column(films: Catalogue, table: str, name: str) -> list[Any]:
    place = COLUMNS[table].index(name)
    return [row[place] for row in films.rows[table]]


def test_every_film_of_the_file_is_there_once(films: Catalogue, source: dict[int, sqlite3.Row]) -> None:
    assert len(source) == 17_472
    assert column(films, "movie", "movie_id") == sorted(source)
    assert column(films, "rating", "movie_id") == sorted(source)


@pytest.mark.parametrize(("role", "list_column"), [("director", "Director"), ("writer", "Writer"), ("cast", "Cast")])
def test_credits_put_together_again_are_the_lists_of_the_file(
    films: Catalogue, source: dict[int, sqlite3.Row], role: str, list_column: str
) -> None:
    name_of = dict(films.rows["person"])
    found: dict[int, list[str]] = defaultdict(list)
    for _, movie_id, person_id, credit_role, billing in films.rows["credit"]:
        if credit_role == role:
            found[movie_id].append(name_of[person_id])
            assert billing == len(found[movie_id])
    differing = {
        movie_id: (film[list_column], ", ".join(found[movie_id]))
        for movie_id, film in source.items()
        if re.sub(" +", " ", film[list_column] or "") != ", ".join(found[movie_id])
    }
    # What differs is what was left out, link by link of the encyclopedia that is not a person.
    assert len(differing) <= films.dropped["credit: not a person"]
    for whole, kept in differing.values():
        left_out = Counter(whole.split(", ")) - Counter(kept.split(", "))
        assert all(catalogue._NOT_A_PERSON.fullmatch(part) for part in left_out)


def test_genres_languages_and_countries_are_those_of_the_file(films: Catalogue, source: dict[int, sqlite3.Row]) -> None:
    genres: dict[int, list[str]] = defaultdict(list)
    for movie_id, genre in films.rows["movie_genre"]:
        genres[movie_id].append(genre)
    for movie_id, languages, countries in zip(
        *(column(films, "movie", name) for name in ("movie_id", "languages", "countries")), strict=True
    ):
        assert ", ".join(genres[movie_id]) == source[movie_id]["Genre"]
        assert ", ".join(languages) == (source[movie_id]["Language"] or "")
        assert ", ".join(countries) == (source[movie_id]["Country"] or "")


def test_box_office_is_the_files_or_counted_as_left_out(films: Catalogue, source: dict[int, sqlite3.Row]) -> None:
    found = dict(
        zip(column(films, "distribution", "movie_id"), column(films, "distribution", "box_office_usd"), strict=True)
    )
    missing = [film["BoxOffice"] for id_, film in source.items() if film["BoxOffice"] and found.get(id_) is None]
    assert len(missing) == films.dropped["distribution.box_office_usd: fraction of a cent"] == 6
    assert all(value < 1_000 for value in missing)
    assert all(source[id_]["BoxOffice"] == float(value) for id_, value in found.items() if value is not None)


def test_dates_are_those_of_the_file_and_say_what_is_released(films: Catalogue, source: dict[int, sqlite3.Row]) -> None:
    rows = zip(*(column(films, "movie", name) for name in ("movie_id", "released_on", "status")), strict=True)
    for movie_id, released_on, status in rows:
        assert released_on == date.fromisoformat(source[movie_id]["Released"])
        assert (status == "released") == (released_on <= date.fromisoformat(source[movie_id]["lastUpdated"]))


def test_reading_twice_gives_the_same_numbers(films: Catalogue) -> None:
    assert read().rows == films.rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, []),
        ("", []),
        ("Ed Begley, Jr., Larry David", ["Ed Begley, Jr.", "Larry David"]),
        ("Stacy Keach, Sr.", ["Stacy Keach, Sr."]),
        ("Ed Begley, Jr., John Gallagher, Jr.", ["Ed Begley, Jr.", "John Gallagher, Jr."]),
        ("Jr., Larry David", ["Jr.", "Larry David"]),
        ("Tim Bentinck, 12th Earl of Portland, Tim Daly", ["Tim Bentinck, 12th Earl of Portland", "Tim Daly"]),
        ("Albert II, Prince of Monaco, Prince", ["Albert II, Prince of Monaco", "Prince"]),
        ("Dennis Weaver, Earl Holliman", ["Dennis Weaver", "Earl Holliman"]),
        ("Crosby, Stills & Nash, Penn & Teller", ["Crosby, Stills & Nash", "Penn & Teller"]),
        ("Roberto  Farías Morales", ["Roberto Farías Morales"]),
        ("Woody Allen, Woody Allen", ["Woody Allen"]),
        ("Woody Allen, , Diane Keaton", ["Woody Allen", "Diane Keaton"]),
        ("Steve Howey, list of Battle Angel Alita characters", ["Steve Howey"]),
    ],
)
def test_names_keep_their_commas_and_drop_what_is_no_name(text: str | None, expected: list[str]) -> None:
    assert names(text, Counter()) == expected


def test_what_is_left_out_is_counted_by_reason() -> None:
    dropped: Counter[str] = Counter()
    names("Woody Allen, , Woody Allen, art director", dropped)
    assert dropped == {
        "credit: empty part of a list": 1,
        "credit: listed twice in one film": 1,
        "credit: not a person": 1,
    }


@pytest.mark.parametrize(
    ("text", "expected", "left_out"),
    [
        ("1999-03-31", date(1999, 3, 31), 0),
        ("1999-03-31 00:00:00", date(1999, 3, 31), 0),
        ("", None, 0),
        (None, None, 0),
        ("1999", None, 1),
        ("1999-02-30", None, 1),
    ],
)
def test_a_date_that_cannot_be_read_is_empty_and_counted(
    text: str | None, expected: date | None, left_out: int
) -> None:
    dropped: Counter[str] = Counter()
    assert catalogue._date(text, dropped, "movie.released_on") == expected
    assert dropped.total() == left_out


def test_an_amount_with_a_fraction_of_a_cent_is_no_amount() -> None:
    dropped: Counter[str] = Counter()
    assert catalogue._dollars(41711.5, dropped) == Decimal("41711.50")
    assert catalogue._dollars(7.386, dropped) is None
    assert dropped.total() == 1


def test_a_film_that_is_not_out_yet_is_announced(few_films: Path) -> None:
    with closing(sqlite3.connect(few_films)) as connection:
        connection.execute("update omdb set Released = '2999-01-01', Year = 2999 where ID = 372")
        connection.execute("update omdb set Released = '', Year = null where ID = 593")
        connection.commit()
    films = read(few_films)
    status = dict(zip(column(films, "movie", "movie_id"), column(films, "movie", "status"), strict=True))
    assert (status[372], status[593]) == ("announced", "announced")


def test_a_file_that_is_missing_or_is_no_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"cannot read the films of .*missing\.db.*No such file"):
        read(tmp_path / "missing.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 10)
    with pytest.raises(CatalogueError, match="not a database"):
        read(tmp_path / "text.db")
