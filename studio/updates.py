"""A bounded stream of real updates on the studio's database, at an exact rate.

    python -m studio.updates --rate 500 --seconds 20 --seed 7

`apply_updates` commits `rate * seconds` row changes in transactions of one to eight, each no
earlier than its share of the time has passed. The same database and seed give the same changes.
What changes is planned in `studio.scenario`; this file only paces and commits.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltaworks.errors import DeltaworksError, InvariantError
from studio.database import DEFAULT_PORT, DatabaseNotReachableError, connect, default_dsn
from studio.scenario import Film, Person, Scenario, Transaction

_FILMS = """
    select movie.movie_id, title, status::text, rating.movie_id is not null, imdb_votes, imdb_rating, fresh, rotten,
           distribution.movie_id is not null, box_office_usd
    from movie left join rating using (movie_id) left join distribution using (movie_id)
    order by movie.movie_id
"""
_PEOPLE = "select person_id, name from person order by person_id"
_GENRES = "select movie_id, genre from movie_genre order by movie_id, genre"
_CREDITS = "select movie_id, person_id, role::text from credit order by credit_id"


class RowsMovedError(InvariantError):
    """Somebody else changed the rows that the stream was about to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A transaction that the database has confirmed; `committed_at` is this machine's clock just after."""

    transaction: Transaction
    committed_at: datetime

    @property
    def changes(self) -> int:
        """Row changes, those of cascades included."""
        return self.transaction.change_count

    @property
    def movie_ids(self) -> tuple[int, ...]:
        """Films whose document must change."""
        return self.transaction.movie_ids

    @property
    def votes(self) -> Mapping[int, int]:
        """`rating.imdb_votes` after this commit, for the films that got votes in it."""
        return self.transaction.votes

    @property
    def deleted(self) -> tuple[int, ...]:
        """Films that are gone."""
        return self.transaction.deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What was committed. `most_behind_s` is how late the latest transaction began, 0 where the rate held."""

    transaction_count: int
    change_count: int
    seconds: float
    most_behind_s: float
    transactions: Mapping[str, int]
    """Transactions by kind."""

    @property
    def changes_per_s(self) -> float:
        """The rate that was reached."""
        return self.change_count / self.seconds if self.seconds else 0.0


def apply_updates(
    dsn: str,
    *,
    rate: float,
    seconds: float,
    seed: int = 0,
    on_commit: Callable[[Commit], None] | None = None,
    stop: threading.Event | None = None,
) -> UpdateReport:
    """Commit `rate * seconds` row changes, evenly over the time; `stop` ends it early, between transactions.

    Reading the studio's films takes about a second and is not part of the time. `on_commit` is
    called in order, in the caller's thread, and holds the next transaction up while it runs.

    Raises:
        ValueError: rate or seconds is not positive.
        DatabaseNotReachableError: no server answers at `dsn`, or it went away; what was committed stays.
        RowsMovedError: another writer deleted or renamed what was about to change.
        LookupError: the database has no films with ratings.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError(f"cannot pace {rate!r} changes/s for {seconds!r} s; both must be positive")
    stop = stop or threading.Event()
    total = max(1, round(rate * seconds))
    done, most_behind_s = 0, 0.0
    kinds: Counter[str] = Counter()
    with connect(dsn) as connection:
        scenario = Scenario(*_read_studio(connection), seed=seed)
        with _committing(connection) as commit:
            started = time.monotonic()
            while done < total:
                ahead_s = started + done / rate - time.monotonic()
                if stop.wait(ahead_s) if ahead_s > 0 else stop.is_set():
                    break
                most_behind_s = max(most_behind_s, -ahead_s)
                transaction = scenario.next(total - done)
                commit(transaction)
                done += transaction.change_count
                kinds[transaction.kind] += 1
                if on_commit is not None:
                    on_commit(Commit(transaction=transaction, committed_at=datetime.now(UTC)))
        return UpdateReport(
            transaction_count=kinds.total(),
            change_count=done,
            seconds=time.monotonic() - started,
            most_behind_s=most_behind_s,
            transactions=dict(kinds),
        )


@contextmanager
def _committing(connection: psycopg.Connection) -> Iterator[Callable[[Transaction], None]]:
    """What sends all statements of a transaction in one go and then the commit, and waits for its answer."""
    # One pipeline for all of them: to begin and end one takes longer than what it carries.
    with connection.pipeline() as pipeline:

        def commit(transaction: Transaction) -> None:
            try:
                connection.execute("begin")
                cursors = [connection.execute(text, values, prepare=True) for text, values in transaction.statements]
                # The counts must be known before the commit, so that a wrong one rolls it back.
                pipeline.sync()
                if any(cursor.rowcount != 1 for cursor in cursors):
                    connection.execute("rollback")
                    pipeline.sync()
                    raise RowsMovedError(
                        f"cannot apply {transaction.kind!r} on films {transaction.movie_ids!r}: another writer moved "
                        "the rows; run the stream alone, or start it again to read the films anew"
                    )
                connection.execute("commit")
                pipeline.sync()
            except psycopg.OperationalError as error:
                raise DatabaseNotReachableError(
                    f"lost the studio's database in the middle of a stream: {type(error).__name__}; "
                    "what was committed stays; start it again when the database is back"
                ) from error

        yield commit


def _read_studio(connection: psycopg.Connection) -> tuple[list[Film], list[Person]]:
    """The films and people as they are, in the order of their numbers."""
    films = {
        row[0]: Film(
            movie_id=row[0],
            title=row[1],
            status=row[2],
            has_rating=row[3],
            votes=row[4],
            imdb_rating=row[5],
            fresh=row[6],
            rotten=row[7],
            has_distribution=row[8],
            box_office_usd=row[9],
        )
        for row in connection.execute(_FILMS)
    }
    people = {person_id: Person(name=name) for person_id, name in connection.execute(_PEOPLE)}
    for movie_id, genre in connection.execute(_GENRES):
        films[movie_id].genres.append(genre)
    for movie_id, person_id, role in connection.execute(_CREDITS):
        films[movie_id].credits.append((people[person_id], role))
        people[person_id].movie_ids.add(movie_id)
    return list(films.values()), list(people.values())


# The command line.

_cli = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@_cli.command(help=__doc__)
def run(
    rate: Annotated[float, typer.Option(min=0.1, help="Row changes per second.")] = 500.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 20.0,
    seed: Annotated[int, typer.Option(help="The same seed on the same database gives the same changes.")] = 0,
    dsn: Annotated[str, typer.Option(envvar="STUDIO_DSN", help="The studio's database.")] = default_dsn(DEFAULT_PORT),
) -> None:
    """Commit the changes and print what was done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("row changes", total=round(rate * seconds))
        report = apply_updates(
            dsn,
            rate=rate,
            seconds=seconds,
            seed=seed,
            on_commit=lambda commit: progress.advance(task, commit.changes),
        )
    print(
        f"{report.change_count:,} row changes in {report.transaction_count:,} transactions in {report.seconds:.2f} s "
        f"({report.changes_per_s:.1f}/s, at most {report.most_behind_s * 1000:.0f} ms behind)"
    )
    for kind, count in sorted(report.transactions.items(), key=lambda item: -item[1]):
        print(f"  {kind:<15}{count:>7,}")


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 1."""
    try:
        _cli()
    except DeltaworksError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
