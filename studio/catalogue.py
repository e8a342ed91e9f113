"""The films of `bokeh-sampledata`'s `movies.db`, parsed into the rows of the studio's tables.

The file has two wide tables joined by ID, with people, genres, languages and countries as
comma-separated lists. `read` turns them into normalised rows and says what it left out and why.
Nothing is guessed: a value that cannot be read becomes NULL and is counted in `Catalogue.dropped`.

| table        | from                                              | rows         |
|--------------|---------------------------------------------------|--------------|
| movie        | omdb                                              | one per film |
| movie_genre  | omdb.Genre                                        | one per part |
| person       | Director, Writer, Cast                            | one per name |
| credit       | Director, Writer, Cast                            | one per part |
| rating       | tomatoes, omdb.Metacritic, imdbRating, imdbVotes  | one per film |
| distribution | tomatoes.Production, BoxOffice, DVD, Website, Image | where any is known |

Status: *released* where the release date, or the year if there is no date, is not after the day
of the catalogue (`lastUpdated`); else *announced*. Every film of the 2026.1 file is released.
"""

import hashlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltaworks.errors import TerminalError

Row = tuple[Any, ...]  # Any: the columns of a row differ in type.

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "movie": (
        *("movie_id", "imdb_id", "title", "year", "certificate", "runtime_min", "released_on"),
        *("languages", "countries", "awards", "oscars", "status", "updated_at"),
    ),
    "movie_genre": ("movie_id", "genre"),
    "person": ("person_id", "name"),
    "credit": ("credit_id", "movie_id", "person_id", "role", "billing"),
    "rating": (
        *("movie_id", "imdb_rating", "imdb_votes", "metascore", "tomato_meter", "tomato_rating"),
        *("tomato_reviews", "fresh", "rotten", "user_meter", "user_rating", "user_reviews", "consensus", "updated_at"),
    ),
    "distribution": ("movie_id", "distributor", "box_office_usd", "home_release_on", "website", "poster_url"),
}
"""The columns that the catalogue fills, per table, in an order in which foreign keys hold."""

_ROLES = (("director", "Director"), ("writer", "Writer"), ("cast", "Cast"))

# A part that cannot be a name by itself belongs to the name before it: 'Ed Begley, Jr.',
# 'Tim Bentinck, 12th Earl of Portland', 'Albert II, Prince of Monaco'.
_CONTINUES_A_NAME = re.compile(
    r"(?:Jr|Sr)\.?|II|III|IV|PhD"
    r"|\d+(?:st|nd|rd|th) (?:Baronet|Baron|Viscount|Earl|Marquess|Duke|Prince)\b.*"
    r"|(?:Prince|Princess|Prince Consort|Duke|Duchess|Earl|Countess|Count|Baron|Baroness) of .+"
)
# Bands whose own name has a comma; no pattern tells them from two names.
_BANDS = frozenset({("Crosby", "Stills & Nash"), ("Earth", "Wind & Fire")})
# The lists were made from links of encyclopedia pages, and some links are not of people.
_NOT_A_PERSON = re.compile(r"list of .+|art director|dialogue writer|Friday the 13th|Troll 2")


class CatalogueError(TerminalError):
    """The file of films cannot be used."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Rows per table in the order of `COLUMNS`, and how many values were left out, by reason."""

    rows: Mapping[str, list[Row]] = field(repr=False)
    dropped: Mapping[str, int]
    sha256: str

    @property
    def row_count(self) -> int:
        """Rows of all tables."""
        return sum(len(rows) for rows in self.rows.values())


def default_path() -> Path:
    """Where the wheel `bokeh-sampledata` keeps its films.

    Raises:
        CatalogueError: the wheel is not installed.
    """
    try:
        # Importing the package is avoided: it pulls in pandas, which takes a second.
        path = Path(str(files("bokeh_sampledata"))) / "_data" / "movies.db"
    except ModuleNotFoundError as error:
        raise CatalogueError(
            "cannot find the films: 'bokeh-sampledata' is not installed; run `pip install 'deltaworks[studio]'`"
        ) from error
    return path


def fingerprint(path: Path) -> str:
    """The SHA-256 of the file in hexadecimal.

    Raises:
        CatalogueError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CatalogueError(f"cannot read the films of {str(path)!r}: {error.strerror}") from error


def read(path: Path | None = None) -> Catalogue:
    """Read every film; rows and the numbers given to people and credits are the same on every call.

    Raises:
        CatalogueError: the file is missing or is not a database of films.
    """
    path = path or default_path()
    sha256 = fingerprint(path)
    rows: dict[str, list[Row]] = {table: [] for table in COLUMNS}
    dropped: Counter[str] = Counter()
    person_ids: dict[str, int] = {}
    for film in _films(path):
        movie_id = film["ID"]
        rows["movie"].append(_movie(film, dropped))
        rows["movie_genre"] += [(movie_id, genre) for genre in _parts(film["Genre"], dropped, "genre")]
        for role, column in _ROLES:
            for billing, name in enumerate(names(film[column], dropped), start=1):
                person_id = person_ids.setdefault(name, len(person_ids) + 1)
                rows["credit"].append((len(rows["credit"]) + 1, movie_id, person_id, role, billing))
        rows["rating"].append(_rating(film))
        distribution = _distribution(film, dropped)
        if any(value is not None for value in distribution[1:]):
            rows["distribution"].append(distribution)
        else:
            dropped["distribution: nothing known of the film"] += 1
    rows["person"] = [(person_id, name) for name, person_id in person_ids.items()]
    return Catalogue(rows=rows, dropped=dict(sorted(dropped.items())), sha256=sha256)


def names(text: str | None, dropped: Counter[str]) -> list[str]:
    """The people of a list, each once, in its order.

    >>> names("Ed Begley, Jr., Larry David", Counter())
    ['Ed Begley, Jr.', 'Larry David']
    """
    found: list[str] = []
    for part in (text or "").split(", "):
        # The source has a few double spaces inside names.
        name = " ".join(part.split())
        if not name:
            if text:
                dropped["credit: empty part of a list"] += 1
        elif _NOT_A_PERSON.fullmatch(name):
            dropped["credit: not a person"] += 1
        elif found and (_CONTINUES_A_NAME.fullmatch(name) or (found[-1], name) in _BANDS):
            found[-1] = f"{found[-1]}, {name}"
        else:
            found.append(name)
    return _once(found, dropped, "credit")


def _films(path: Path) -> Iterator[sqlite3.Row]:
    query = """
        select omdb.*, tomatoes.Image, tomatoes.Rating as tomatoRating, tomatoes.Meter, tomatoes.Reviews,
               tomatoes.Fresh, tomatoes.Rotten, tomatoes.Consensus, tomatoes.userMeter, tomatoes.userRating,
               tomatoes.userReviews, tomatoes.DVD, tomatoes.BoxOffice, tomatoes.Production, tomatoes.Website
        from omdb left join tomatoes using (ID)
        order by omdb.ID
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            yield from connection.execute(query)
    except sqlite3.Error as error:
        raise CatalogueError(f"cannot read the films of {str(path)!r}: {error}") from error


def _movie(film: sqlite3.Row, dropped: Counter[str]) -> Row:
    released_on = _date(film["Released"], dropped, "movie.released_on")
    updated_on = _date(film["lastUpdated"], dropped, "movie.updated_at") or datetime.now(UTC).date()
    is_out = released_on <= updated_on if released_on else bool(film["Year"]) and film["Year"] < updated_on.year
    return (
        film["ID"],
        film["imdbID"] or None,
        film["Title"],
        film["Year"] or None,
        film["Rating"] or None,
        film["Runtime"] or None,
        released_on,
        _parts(film["Language"], dropped, "language"),
        _parts(film["Country"], dropped, "country"),
        film["Awards"] or None,
        film["Oscars"] or 0,
        "released" if is_out else "announced",
        datetime(updated_on.year, updated_on.month, updated_on.day, tzinfo=UTC),
    )


def _rating(film: sqlite3.Row) -> Row:
    updated_on = film["lastUpdated"]
    return (
        film["ID"],
        *(film[name] for name in ("imdbRating", "imdbVotes", "Metacritic", "Meter", "tomatoRating", "Reviews")),
        *(film[name] for name in ("Fresh", "Rotten", "userMeter", "userRating", "userReviews")),
        film["Consensus"] or None,
        f"{updated_on} 00:00:00+00",
    )


def _distribution(film: sqlite3.Row, dropped: Counter[str]) -> Row:
    return (
        film["ID"],
        film["Production"] or None,
        _dollars(film["BoxOffice"], dropped),
        _date(film["DVD"], dropped, "distribution.home_release_on"),
        film["Website"] or None,
        film["Image"] or None,
    )


def _dollars(value: float | None, dropped: Counter[str]) -> Decimal | None:
    if value is None:
        return None
    amount = Decimal(str(value))
    # '7.386' was a count of thousands or of something else; no sum of money has three decimals.
    if amount != amount.quantize(Decimal("0.01")):
        dropped["distribution.box_office_usd: fraction of a cent"] += 1
        return None
    return amount


def _date(text: str | None, dropped: Counter[str], column: str) -> date | None:
    if not text:
        return None
    try:
        return date.fromisoformat(text[:10])
    except ValueError:
        dropped[f"{column}: not a date"] += 1
        return None


def _parts(text: str | None, dropped: Counter[str], what: str) -> list[str]:
    parts = [part.strip() for part in (text or "").split(", ")]
    return _once([part for part in parts if part], dropped, what)


def _once(items: list[str], dropped: Counter[str], what: str) -> list[str]:
    distinct = list(dict.fromkeys(items))
    if len(distinct) < len(items):
        dropped[f"{what}: listed twice in one film"] += len(items) - len(distinct)
    return distinct
