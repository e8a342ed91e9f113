"""A small lake, filled anew for every test, and dbt in this process on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deltaworks.store.lake import Lake

PROJECT = Path(__file__).parents[2] / "dbt_project"

TABLES = {
    "movie": "movie_id integer, imdb_id varchar, title varchar, year smallint, certificate varchar, "
    "runtime_min decimal(6,1), released_on date, languages varchar[], countries varchar[], awards varchar, "
    "oscars smallint, status varchar, plot varchar, updated_at timestamptz",
    "movie_genre": "movie_id integer, genre varchar",
    "person": "person_id integer, name varchar, born_on date, updated_at timestamptz",
    "credit": "credit_id bigint, movie_id integer, person_id integer, role varchar, billing smallint",
    "rating": "movie_id integer, imdb_rating decimal(3,1), imdb_votes integer, metascore smallint, "
    "tomato_meter smallint, tomato_rating decimal(3,1), tomato_reviews integer, fresh integer, rotten integer, "
    "user_meter smallint, user_rating decimal(3,2), user_reviews integer, consensus varchar, updated_at timestamptz",
    "distribution": "movie_id integer, distributor varchar, box_office_usd decimal(14,2), home_release_on date, "
    "website varchar, poster_url varchar",
}
"""Columns as `load` brings them from the studio's database, before `_commit` and `_committed_at`."""

ROWS = """
    insert into lake.studio.movie
        (movie_id, title, year, runtime_min, languages, countries, oscars, status, _committed_at)
    values
        (1, 'First Light', 1999, 100.0, ['English'], ['France'], 2, 'released', '2026-01-01 10:00:00+00'),
        (2, 'Second Wind', 1995, 90.0, ['English'], [], 0, 'released', '2026-01-01 10:00:00+00'),
        (3, 'Third Way', 2003, null, [], [], 1, 'released', '2026-01-01 10:00:00+00'),
        (4, 'Fourth Draft', null, null, [], [], 0, 'draft', '2026-01-01 10:00:00+00'),
        (5, 'Fifth Column', 2000, null, [], [], 0, 'withdrawn', '2026-01-01 10:00:00+00');
    insert into lake.studio.movie_genre (movie_id, genre)
    values (1, 'Drama'), (1, 'Comedy'), (2, 'Drama'), (3, 'Drama'), (4, 'Drama'), (5, 'War');
    insert into lake.studio.person (person_id, name) values (1, 'Ada Ames'), (2, 'Ben Bold'), (3, 'Cy Cole');
    insert into lake.studio.credit (credit_id, movie_id, person_id, role, billing)
    values
        (1, 1, 1, 'director', 1), (2, 2, 1, 'director', 1), (3, 3, 1, 'director', 1), (4, 4, 3, 'director', 1),
        (5, 1, 2, 'cast', 2), (6, 2, 2, 'cast', 1), (7, 1, 1, 'cast', 1), (8, 3, 3, 'writer', 1), (9, 5, 2, 'cast', 1);
    insert into lake.studio.rating
        (movie_id, imdb_votes, metascore, tomato_meter, tomato_rating, tomato_reviews, fresh, rotten, _committed_at)
    values
        (1, 10, 80, 75, 7.5, 4, 3, 1, '2026-01-02 10:00:00+00'),
        (2, null, 60, 50, 5.0, 2, 1, 1, '2026-01-01 10:00:00+00');
    insert into lake.studio.distribution (movie_id, distributor, box_office_usd)
    values (1, 'Alpha Films, Inc., Beta', 100.50), (2, 'Beta', null), (5, 'Beta', 7);
    insert into lake.movie_search.movies values (1, 'First Light'), (2, 'Second Wind');
"""

Dbt = Callable[..., Any]


@pytest.fixture(scope="session")
def lake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the lake is; one for all tests, as dbt parses the project anew when the lake's address changes."""
    return tmp_path_factory.mktemp("dbt")


@pytest.fixture(scope="session")
def lake(lake_folder: Path) -> Iterator[Lake]:
    """The tables as capture and apps leave them."""
    catalog, data = f"sqlite:{lake_folder}/lake/catalog.sqlite", str(lake_folder / "lake" / "data")
    with Lake.open(catalog=catalog, data=data, extensions=lake_folder / "extensions") as lake:
        statements = [
            "begin",
            "create schema lake.studio",
            "create schema lake.movie_search",
            "create schema lake.prod",
        ]
        statements += [
            f"create table lake.studio.{name} ({columns}, _commit ubigint, _committed_at timestamptz)"
            for name, columns in TABLES.items()
        ]
        statements += ["create table lake.movie_search.movies (movie_id integer, title varchar)", "commit"]
        lake.connection.execute(";".join(statements))
        yield lake


@pytest.fixture(autouse=True)
def dbt_at_the_lake(lake_folder: Path) -> Iterator[None]:
    """Tests of other folders run between those of this one, and point dbt at lakes of their own."""
    with _pointed_at(lake_folder):
        yield


@contextmanager
def _pointed_at(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DELTAWORKS_LAKE_CATALOG", f"sqlite:{folder}/lake/catalog.sqlite")
        environment.setenv("DELTAWORKS_EXTENSIONS", str(folder / "extensions"))
        yield


@pytest.fixture
def small_lake(lake: Lake) -> Lake:
    """Five films, three people and two documents, whatever an earlier test did to them."""
    tables = [*(f"studio.{name}" for name in TABLES), "movie_search.movies"]
    lake.connection.execute(";".join(["begin", *(f"delete from lake.{table}" for table in tables), ROWS, "commit"]))
    return lake


@pytest.fixture(scope="session")
def dbt(lake: Lake, lake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dbt:
    """Runs a dbt command in this process and returns its result."""
    from dbt.cli.main import dbtRunner  # noqa: PLC0415  takes three seconds, and warns

    options = [
        *("--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT)),
        *("--target-path", str(tmp_path_factory.mktemp("dbt_target")), "--log-level-file", "none"),
    ]
    # Parsed once: every later command would spend a second on finding out that nothing changed.
    with _pointed_at(lake_folder):
        manifest = dbtRunner().invoke(["--quiet", "parse", *options]).result

    def invoke(*command: str) -> Any:
        return dbtRunner(manifest=manifest).invoke(["--quiet", *command, *options])

    return invoke


@pytest.fixture(scope="session")
def staged(lake: Lake, lake_folder: Path, dbt: Dbt) -> None:
    """The views of staging stand; they show whatever the tables hold at the time."""
    with _pointed_at(lake_folder):
        assert dbt("run", "--select", "tag:staging").success
