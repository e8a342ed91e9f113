"""What happens at a film studio in a day, as small transactions: pure planning, no database.

A `Scenario` knows the studio's films and people, deals kinds of work from a shuffled deck, and
applies each transaction it plans to its own picture. The same films and the same seed give the
same transactions. Rows are named by what identifies them for good (a film's number, a person's
name), so no number that the database gives out is needed.

| kind            | rows | tables                                                  |
|-----------------|------|---------------------------------------------------------|
| votes           | 1-8  | rating                                                  |
| reviews         | 1-4  | rating                                                  |
| box_office      | 1-3  | distribution                                            |
| credit_added    | 1-2  | credit, and person where somebody is new                |
| credit_removed  | 1-2  | credit                                                  |
| retitled        | 1    | movie                                                   |
| status_changed  | 1    | movie                                                   |
| genre_changed   | 2    | movie_genre                                             |
| person_renamed  | 1    | person                                                  |
| film_added      | 5-8  | movie, movie_genre, rating, distribution, credit        |
| film_deleted    | 1-8  | movie, and all its rows elsewhere                       |
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, LiteralString

MAX_CHANGES = 8
"""Rows of the largest transaction."""

DECK: Mapping[str, int] = {
    "votes": 62,
    "reviews": 10,
    "box_office": 5,
    "credit_added": 8,
    "credit_removed": 4,
    "retitled": 3,
    "status_changed": 3,
    "genre_changed": 2,
    "person_renamed": 1,
    "film_added": 1,
    "film_deleted": 1,
}
"""Transactions of each kind in every hundred."""

_INITIAL = re.compile(r"[A-Z]\.")
_CUTS = (" (Director's Cut)", " (Restored)", " (Extended)")
_RELEASE: LiteralString = (
    "update movie set status = %s, released_on = coalesce(released_on, current_date), "
    "year = coalesce(year, extract(year from current_date)::smallint) where movie_id = %s"
)
_HOT_FILMS = 100
_HOT_SHARE = 0.3
"""Many votes go to few films, so that changes of one key follow each other closely."""


@dataclass(slots=True, kw_only=True, eq=False)
class Person:
    """A person, the same one while the name changes."""

    name: str
    movie_ids: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True, eq=False)
class Film:
    """What the planner must know of a film; `votes` and the rest are `None` where the database has NULL."""

    movie_id: int
    title: str
    status: str
    votes: int | None = None
    imdb_rating: Decimal | None = None
    fresh: int | None = None
    rotten: int | None = None
    has_rating: bool = False
    has_distribution: bool = False
    box_office_usd: Decimal | None = None
    genres: list[str] = field(default_factory=list)
    credits: list[tuple[Person, str]] = field(default_factory=list)

    @property
    def row_count(self) -> int:
        """Rows that go when the film is deleted."""
        return 1 + len(self.genres) + len(self.credits) + self.has_rating + self.has_distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One planned transaction: statements, each of which must meet exactly one row by itself."""

    kind: str
    statements: tuple[tuple[LiteralString, tuple[Any, ...]], ...] = field(repr=False)
    change_count: int
    """Row changes in the source's log, those of cascades included."""
    movie_ids: tuple[int, ...]
    """Films whose document must change: those touched, and those of a renamed person."""
    votes: Mapping[int, int] = field(default_factory=dict)
    """`rating.imdb_votes` after the commit, for the films that got votes in it."""
    deleted: tuple[int, ...] = ()
    """Films that are gone after the commit."""


class Scenario:
    """Plans one transaction after another; not thread-safe."""

    def __init__(self, films: Iterable[Film], people: Iterable[Person], *, seed: int) -> None:
        """Take the studio as it is now, in an order that does not change between runs."""
        self._films = {film.movie_id: film for film in films}
        self._ids = list(self._films)
        self._people = list(people)
        self._names = {person.name for person in self._people}
        self._genres = sorted({genre for film in self._films.values() for genre in film.genres})
        # Plain pseudo-random numbers: a run must be repeatable, not secret.
        self._random = random.Random(seed)  # noqa: S311
        self._hot = self._random.sample(self._ids, min(_HOT_FILMS, len(self._ids)))
        self._next_id = max(self._ids, default=0) + 1
        self._unsettled = [movie_id for movie_id in self._ids if self._films[movie_id].status != "released"]
        self._small = [film.movie_id for film in self._films.values() if film.row_count <= MAX_CHANGES]
        self._deck: list[str] = []
        self._plans: Mapping[str, Callable[[int], Transaction | None]] = {
            "votes": self._votes,
            "reviews": self._reviews,
            "box_office": self._box_office,
            "credit_added": self._credit_added,
            "credit_removed": self._credit_removed,
            "retitled": self._retitled,
            "status_changed": self._status_changed,
            "genre_changed": self._genre_changed,
            "person_renamed": self._person_renamed,
            "film_added": self._film_added,
            "film_deleted": self._film_deleted,
        }

    def next(self, limit: int = MAX_CHANGES) -> Transaction:
        """Plan the next transaction, of at most `limit` row changes.

        Raises:
            LookupError: no film has a rating that could change.
        """
        limit = min(limit, MAX_CHANGES)
        # What finds nothing to do, or does not fit into what is left, gives way to votes, which always fit.
        planned = self._plans[self._deal()](limit) or self._votes(limit)
        if planned is None:
            raise LookupError("no film has a rating that could change")
        return planned

    def _deal(self) -> str:
        if not self._deck:
            self._deck = [kind for kind, count in DECK.items() for _ in range(count)]
            self._random.shuffle(self._deck)
        return self._deck.pop()

    # Each planner returns `None` where there is nothing of its kind to do within the limit.

    def _votes(self, limit: int) -> Transaction | None:
        films = self._pick(self._random.randint(1, limit), lambda film: film.has_rating, hot=_HOT_SHARE)
        for film in films:
            film.votes = (film.votes or 0) + self._random.randint(1, 400)
            film.imdb_rating = self._nudged(film.imdb_rating)
        return _rows(
            "votes",
            films,
            "update rating set imdb_votes = %s, imdb_rating = %s where movie_id = %s",
            lambda film: (film.votes, film.imdb_rating, film.movie_id),
        )

    def _reviews(self, limit: int) -> Transaction | None:
        films = self._pick(self._random.randint(1, min(4, limit)), lambda film: film.has_rating)
        for film in films:
            is_fresh = self._random.random() < 0.6
            film.fresh = (film.fresh or 0) + is_fresh
            film.rotten = (film.rotten or 0) + (not is_fresh)
        return _rows(
            "reviews",
            films,
            "update rating set fresh = %s, rotten = %s, tomato_reviews = %s, tomato_meter = %s where movie_id = %s",
            _review_values,
        )

    def _box_office(self, limit: int) -> Transaction | None:
        films = self._pick(self._random.randint(1, min(3, limit)), lambda film: film.has_distribution)
        for film in films:
            film.box_office_usd = (film.box_office_usd or Decimal(0)) + self._random.randint(1_000, 2_000_000)
        return _rows(
            "box_office",
            films,
            "update distribution set box_office_usd = %s where movie_id = %s",
            lambda film: (film.box_office_usd, film.movie_id),
        )

    def _credit_added(self, limit: int) -> Transaction | None:
        films = self._pick(1)
        if not films or not self._people:
            return None
        film = films[0]
        person, is_new = self._anybody(new=limit > 1 and self._random.random() < 0.3)
        if (person, "cast") in film.credits:
            return None
        statements = [("insert into person (name) values (%s)", (person.name,))] if is_new else []
        statements.append(_new_credit(film, person, "cast"))
        return Transaction(
            kind="credit_added",
            statements=tuple(statements),
            change_count=len(statements),
            movie_ids=(film.movie_id,),
        )

    def _credit_removed(self, limit: int) -> Transaction | None:
        films = self._pick(1, lambda film: len(film.credits) > 2)
        if not films:
            return None
        film = films[0]
        statements = []
        for _ in range(self._random.randint(1, min(2, limit))):
            person, role = film.credits.pop(self._random.randrange(len(film.credits)))
            if all(other is not person for other, _ in film.credits):
                person.movie_ids.discard(film.movie_id)
            statements.append(
                (
                    "delete from credit where movie_id = %s and role = %s "
                    "and person_id = (select person_id from person where name = %s)",
                    (film.movie_id, role, person.name),
                )
            )
        return Transaction(
            kind="credit_removed",
            statements=tuple(statements),
            change_count=len(statements),
            movie_ids=(film.movie_id,),
        )

    def _retitled(self, _limit: int) -> Transaction | None:
        films = self._pick(1)
        for film in films:
            cut = next((cut for cut in _CUTS if film.title.endswith(cut)), None)
            film.title = film.title.removesuffix(cut) if cut else film.title + self._random.choice(_CUTS)
        return _rows(
            "retitled",
            films,
            "update movie set title = %s where movie_id = %s",
            lambda film: (film.title, film.movie_id),
        )

    def _status_changed(self, _limit: int) -> Transaction | None:
        if self._unsettled and self._random.random() < 0.6:
            film = self._films.get(self._unsettled.pop(self._random.randrange(len(self._unsettled))))
        else:
            film = next(iter(self._pick(1)), None)
        if film is None:
            return None
        film.status = {"draft": "announced", "announced": "released", "withdrawn": "released"}.get(
            film.status, "withdrawn"
        )
        if film.status != "released":
            self._unsettled.append(film.movie_id)
        return _rows(
            "status_changed",
            [film],
            _RELEASE if film.status == "released" else "update movie set status = %s where movie_id = %s",
            lambda film: (film.status, film.movie_id),
        )

    def _genre_changed(self, limit: int) -> Transaction | None:
        films = self._pick(1, lambda film: 0 < len(film.genres) < len(self._genres))
        if not films or limit < 2:
            return None
        film = films[0]
        old = self._random.choice(film.genres)
        new = self._random.choice([genre for genre in self._genres if genre not in film.genres])
        film.genres[film.genres.index(old)] = new
        return Transaction(
            kind="genre_changed",
            statements=(
                ("delete from movie_genre where movie_id = %s and genre = %s", (film.movie_id, old)),
                ("insert into movie_genre (movie_id, genre) values (%s, %s)", (film.movie_id, new)),
            ),
            change_count=2,
            movie_ids=(film.movie_id,),
        )

    def _person_renamed(self, _limit: int) -> Transaction | None:
        films = self._pick(1, lambda film: bool(film.credits))
        if not films:
            return None
        # Through a film, so that people of many films are renamed more often than others.
        person = self._random.choice(films[0].credits)[0]
        new = self._unused_name(person.name)
        old, person.name = person.name, new
        self._names.discard(old)
        return Transaction(
            kind="person_renamed",
            statements=(("update person set name = %s where name = %s", (new, old)),),
            change_count=1,
            movie_ids=tuple(sorted(person.movie_ids)),
        )

    def _film_added(self, limit: int) -> Transaction | None:
        models = self._pick(1, lambda film: bool(film.genres and film.credits))
        if not models or limit < 5:
            return None
        model = models[0]
        film = Film(
            movie_id=self._next_id,
            title=f"{model.title}: {self._random.choice(('The Return', 'The Next Chapter', 'Origins'))}",
            status=self._random.choice(("draft", "announced", "announced", "announced")),
            genres=model.genres[:1],
            has_rating=True,
            has_distribution=True,
        )
        self._next_id += 1
        self._films[film.movie_id] = film
        self._ids.append(film.movie_id)
        self._unsettled.append(film.movie_id)
        statements: list[tuple[LiteralString, tuple[Any, ...]]] = [
            (
                "insert into movie (movie_id, title, languages, countries, status) values (%s, %s, %s, %s, %s)",
                (film.movie_id, film.title, ["English"], ["United States"], film.status),
            ),
            ("insert into movie_genre (movie_id, genre) values (%s, %s)", (film.movie_id, film.genres[0])),
            ("insert into rating (movie_id) values (%s)", (film.movie_id,)),
            ("insert into distribution (movie_id, distributor) values (%s, %s)", (film.movie_id, "Delta Pictures")),
        ]
        for person, role in model.credits[: limit - len(statements)]:
            statements.append(_new_credit(film, person, role))
        return Transaction(
            kind="film_added",
            statements=tuple(statements),
            change_count=len(statements),
            movie_ids=(film.movie_id,),
        )

    def _film_deleted(self, limit: int) -> Transaction | None:
        fitting = [id_ for id_ in self._small if id_ in self._films and self._films[id_].row_count <= limit]
        if not fitting:
            return None
        film = self._films.pop(self._random.choice(fitting))
        self._ids.remove(film.movie_id)
        for person, _ in film.credits:
            person.movie_ids.discard(film.movie_id)
        return Transaction(
            kind="film_deleted",
            statements=(("delete from movie where movie_id = %s", (film.movie_id,)),),
            change_count=film.row_count,
            movie_ids=(film.movie_id,),
            deleted=(film.movie_id,),
        )

    def _pick(self, count: int, fits: Callable[[Film], bool] = lambda _: True, *, hot: float = 0.0) -> list[Film]:
        """Up to `count` different films that fit; fewer where they are rare."""
        found: dict[int, Film] = {}
        for _ in range(20 * count):
            pool = self._hot if self._random.random() < hot else self._ids
            film = self._films.get(self._random.choice(pool)) if pool else None
            if film is not None and fits(film):
                found[film.movie_id] = film
            if len(found) == count:
                break
        return list(found.values())

    def _nudged(self, rating: Decimal | None) -> Decimal:
        if rating is None:
            return Decimal(self._random.randint(40, 90)) / 10
        step = Decimal(self._random.choice((-1, 0, 0, 1))) / 10
        return min(max(rating + step, Decimal(1)), Decimal(10))

    def _anybody(self, *, new: bool) -> tuple[Person, bool]:
        known = self._random.choice(self._people)
        if not new:
            return known, False
        person = Person(name=self._unused_name(known.name))
        self._people.append(person)
        return person, True

    def _unused_name(self, name: str) -> str:
        """The name with other middle initials, which nobody has; it is taken with this call."""
        first, *rest = name.split()
        rest = [word for word in rest if not _INITIAL.fullmatch(word)]
        for count in itertools.count(1):
            initials = [f"{self._random.choice('ABCDEFGHIJKLMNOPRSTVW')}." for _ in range(count)]
            candidate = " ".join((first, *initials, *rest))
            if candidate not in self._names:
                self._names.add(candidate)
                return candidate
        raise AssertionError("unreachable: there are more initials than names")


def _rows(
    kind: str, films: list[Film], statement: LiteralString, values: Callable[[Film], tuple[Any, ...]]
) -> Transaction | None:
    """The same statement for each film; `None` without films."""
    if not films:
        return None
    return Transaction(
        kind=kind,
        statements=tuple((statement, values(film)) for film in films),
        change_count=len(films),
        movie_ids=tuple(film.movie_id for film in films),
        votes={film.movie_id: film.votes for film in films if film.votes is not None} if kind == "votes" else {},
    )


def _review_values(film: Film) -> tuple[Any, ...]:
    fresh, rotten = film.fresh or 0, film.rotten or 0
    return fresh, rotten, fresh + rotten, round(100 * fresh / (fresh + rotten)), film.movie_id


def _new_credit(film: Film, person: Person, role: str) -> tuple[LiteralString, tuple[Any, ...]]:
    billing = 1 + sum(other == role for _, other in film.credits)
    film.credits.append((person, role))
    person.movie_ids.add(film.movie_id)
    return (
        "insert into credit (movie_id, person_id, role, billing) "
        "select %s, person_id, %s, %s from person where name = %s",
        (film.movie_id, role, billing, person.name),
    )
