"""The stream of updates; the database's own log, read by `test_decoding`, is the oracle."""

import random
import re
import threading
from collections import Counter
from datetime import UTC, datetime

import psycopg
import pytest
from servers.postgres import Database

from studio.database import DatabaseNotReachableError
from studio.scenario import DECK, MAX_CHANGES, Film, Person, Scenario
from studio.updates import Commit, RowsMovedError, apply_updates


def test_the_rate_is_kept_and_every_change_is_in_the_log(studio: Database) -> None:
    studio.rows("select pg_create_logical_replication_slot('oracle', 'test_decoding')")
    commits: list[Commit] = []
    report = apply_updates(studio.dsn, rate=1_000, seconds=2, seed=1, on_commit=commits.append)
    logged = changes_per_transaction(studio)
    assert report.change_count == sum(logged) == 2_000
    assert logged == [commit.changes for commit in commits]
    assert max(logged) <= MAX_CHANGES
    assert report.transaction_count == len(commits)
    # The last transaction may begin no earlier than its share of the time.
    assert report.seconds >= 2 - MAX_CHANGES / 1_000


def changes_per_transaction(database: Database) -> list[int]:
    counts: list[int] = []
    for (line,) in database.rows("select data from pg_logical_slot_get_changes('oracle', null, null)"):
        if line.startswith("BEGIN"):
            counts.append(0)
        elif line.startswith("table public."):
            counts[-1] += 1
    return [count for count in counts if count]


def test_all_kinds_of_work_happen_and_each_commit_says_what_it_left(studio: Database) -> None:
    votes: dict[int, int] = {}
    deleted: set[int] = set()
    started = datetime.now(UTC)

    def watch(commit: Commit) -> None:
        votes.update(commit.votes)
        deleted.update(commit.deleted)
        assert commit.movie_ids or commit.transaction.kind == "person_renamed"
        assert started <= commit.committed_at <= datetime.now(UTC)

    before = dict(studio.rows("select person_id, name from person"))
    report = apply_updates(studio.dsn, rate=4_000, seconds=1, seed=5, on_commit=watch)
    assert set(report.transactions) == set(DECK)
    found = dict(studio.rows("select movie_id, imdb_votes from rating where imdb_votes is not null"))
    assert found == {movie_id: count for movie_id, count in votes.items() if movie_id not in deleted}
    present = {movie_id for (movie_id,) in studio.rows("select movie_id from movie")}
    assert deleted
    assert not deleted & present
    renamed = [id_ for id_, name in studio.rows("select person_id, name from person") if before.get(id_, name) != name]
    assert 0 < len(renamed) <= report.transactions["person_renamed"]


def test_the_same_seed_on_the_same_database_gives_the_same_changes(studio: Database, second_studio: Database) -> None:
    runs: list[list[Commit]] = [[], []]
    for database, commits in zip((studio, second_studio), runs, strict=True):
        apply_updates(database.dsn, rate=10_000, seconds=0.1, seed=11, on_commit=commits.append)
    first, second = ([commit.transaction for commit in commits] for commits in runs)
    assert first == second
    ratings = "select movie_id, imdb_rating, imdb_votes, tomato_meter from rating order by movie_id"
    assert studio.rows(ratings) == second_studio.rows(ratings)


def test_stop_ends_it_between_transactions(studio: Database) -> None:
    stop = threading.Event()

    def stop_after_100(commit: Commit) -> None:
        done.append(commit.changes)
        if sum(done) >= 100:
            stop.set()

    done: list[int] = []
    report = apply_updates(studio.dsn, rate=1_000, seconds=60, seed=2, on_commit=stop_after_100, stop=stop)
    assert 100 <= report.change_count < 100 + MAX_CHANGES
    assert report.change_count == sum(done)


def test_another_writer_stops_the_stream_and_the_transaction_is_rolled_back(studio: Database) -> None:
    votes: dict[int, int] = {}

    def delete_ratings_of_others(commit: Commit) -> None:
        if not votes:
            studio.execute("delete from rating where movie_id % 3 = 0")
        votes.update(commit.votes)

    with pytest.raises(RowsMovedError, match="another writer moved the rows"):
        apply_updates(studio.dsn, rate=1_000, seconds=1, seed=3, on_commit=delete_ratings_of_others)
    found = dict(studio.rows("select movie_id, imdb_votes from rating where imdb_votes is not null"))
    assert found == {movie_id: count for movie_id, count in votes.items() if movie_id % 3}


def test_a_lost_server_is_named_and_keeps_what_was_committed(studio: Database) -> None:
    commits: list[Commit] = []

    def end_the_connection(commit: Commit) -> None:
        commits.append(commit)
        if len(commits) == 3:
            with psycopg.connect(studio.server.dsn(), autocommit=True) as admin:
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [studio.name]
                )

    with pytest.raises(DatabaseNotReachableError, match="lost the studio's database"):
        apply_updates(studio.dsn, rate=1_000, seconds=1, seed=1, on_commit=end_the_connection)
    assert len(commits) == 3


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (1, 0), (-1, 1)])
def test_a_rate_or_time_that_is_not_positive_is_refused(loaded: Database, rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="both must be positive"):
        apply_updates(loaded.dsn, rate=rate, seconds=seconds)


@pytest.mark.parametrize("seed", range(20))
def test_no_planned_transaction_is_larger_than_its_limit(seed: int) -> None:
    scenario, limits = Scenario(*small_studio(), seed=seed), random.Random(seed)
    kinds: Counter[str] = Counter()
    for _ in range(400):
        limit = limits.randint(1, 10)
        transaction = scenario.next(limit)
        kinds[transaction.kind] += 1
        assert 1 <= transaction.change_count <= min(limit, MAX_CHANGES)
        assert all(text.count("%s") == len(values) for text, values in transaction.statements)
    assert kinds.total() == 400


def test_a_studio_without_films_has_nothing_to_change() -> None:
    with pytest.raises(LookupError, match="no film has a rating"):
        Scenario([], [], seed=0).next()


def test_a_new_name_is_one_that_nobody_has() -> None:
    scenario = Scenario([], [Person(name="Woody Allen"), Person(name="Prince")], seed=0)
    names = {scenario._unused_name(name) for name in ("Woody Allen", "Prince") for _ in range(200)}
    assert len(names) == 400
    assert all(re.fullmatch(r"(Woody( [A-Z]\.)+ Allen|Prince( [A-Z]\.)+)", name) for name in names)


def small_studio() -> tuple[list[Film], list[Person]]:
    people = [Person(name=f"Person Number{number}") for number in range(50)]
    films = [
        Film(
            movie_id=number,
            title=f"Film {number}",
            status="released",
            has_rating=True,
            has_distribution=number % 2 == 0,
            genres=[("Drama", "Comedy", "War")[number % 3]],
        )
        for number in range(1, 200)
    ]
    for film in films:
        for place in range(film.movie_id % 5):
            person = people[(film.movie_id * 7 + place) % len(people)]
            film.credits.append((person, "cast"))
            person.movie_ids.add(film.movie_id)
    return films, people
