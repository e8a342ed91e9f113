"""What a stranger types and what comes up."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document
from deltaworks.store.search import SearchIndex, SearchReader, SearchWriter
from deltaworks.store.search.layout import FreshnessRecord

SPEC = SearchIndex("movies", text={"title": 4.0, "directors.name": 1.5, "cast.name": 1.5}, popularity="votes")


def film(title: str, *, directors: str = "", cast: str = "", votes: int | None = None) -> dict[str, Any]:
    return {
        "title": title,
        "directors": [{"name": name} for name in directors.split(", ") if name],
        "cast": [{"name": name} for name in cast.split(", ") if name],
        "votes": votes,
    }


FILMS = [
    film("Alien", directors="Ridley Scott", cast="Sigourney Weaver, Tom Skerritt", votes=900_000),
    film("Aliens", directors="James Cameron", cast="Sigourney Weaver", votes=700_000),
    film("Alien Autopsy", directors="Jonny Campbell", votes=4_000),
    film("Amélie", directors="Jean-Pierre Jeunet", cast="Audrey Tautou", votes=760_000),
    film("Schindler's List", directors="Steven Spielberg", cast="Liam Neeson", votes=1_400_000),
    film("Lincoln", directors="Steven Spielberg", cast="Daniel Day-Lewis", votes=260_000),
    film("The Gambler", cast="Abraham Lincoln Washington", votes=2_000_000),
    film("Spider-Man", directors="Sam Raimi", cast="Tobey Maguire", votes=800_000),
    film("The Godfather", directors="Francis Ford Coppola", cast="Marlon Brando, Al Pacino", votes=1_900_000),
    film("Barry Lyndon", directors="Stanley Kubrick", cast="Godfrey Quigley", votes=2_000_000),
    film("WALL·E", directors="Andrew Stanton", votes=1_100_000),
    film("東京物語", directors="小津安二郎"),
]


@pytest.fixture(scope="module", params=["committed", "recent", "both"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films in tantivy's index, in the recent documents above it, or every other one there, hiding an old one."""
    folder = tmp_path_factory.mktemp("index")

    def document(number: int, position: int, body: dict[str, Any]) -> Document:
        return Document(key=number, version=Version(Lsn(position), 0), committed_at=datetime.now(UTC), body=body)

    documents = [document(number, number + 1, body) for number, body in enumerate(FILMS)]
    old = [document(number, 0, film("Alien, an old name")) for number in range(len(FILMS))]
    flushes = {
        "committed": [documents],
        "recent": [documents],
        "both": [old[::2] + documents[1::2], documents[::2]],
    }
    for number, flush in enumerate(flushes[request.param]):
        is_committed = request.param == "committed" or (request.param == "both" and number == 0)
        writer = SearchWriter.open(folder, SPEC, recent_at_most=1 if is_committed else 1_000)
        writer.write(flush)
        writer.flush(up_to=Lsn(100))
        writer.close()
    record = FreshnessRecord.load(folder)
    assert record is not None
    assert bool(record.recent) == (request.param != "committed")
    return folder


@pytest.fixture
def reader(folder: Path) -> SearchReader:
    return SearchReader(folder)


def titles(reader: SearchReader, query: str, limit: int = 10) -> list[str]:
    return [hit.body["title"] for hit in reader.search(query, limit).hits]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("alien", "Alien"),
        ("ALIENS", "Aliens"),
        ("alien aut", "Alien Autopsy"),
        ("amelie", "Amélie"),
        ("amélie", "Amélie"),
        ("AME\u0301LIE", "Amélie"),
        ("schindlers list", "Schindler's List"),
        ("schindler\u2019s", "Schindler's List"),
        ("spider man", "Spider-Man"),
        ("wall-e", "WALL·E"),
        ("godf", "The Godfather"),
        ("the god", "The Godfather"),
        ("東京", "東京物語"),
        ("小津", "東京物語"),
        ("neeson", "Schindler's List"),
        ("day lewis linc", "Lincoln"),
        ("pacino godfather coppola", "The Godfather"),
    ],
)
def test_a_title_or_a_name_finds_its_film_first(reader: SearchReader, query: str, first: str) -> None:
    assert titles(reader, query)[0] == first


def test_every_word_has_to_match_somewhere(reader: SearchReader) -> None:
    assert titles(reader, "weaver alien") == ["Alien", "Aliens"]
    assert titles(reader, "alien weaver") == ["Alien"]
    assert titles(reader, "spielberg lincoln") == ["Lincoln"]


def test_a_title_ranks_above_people_however_popular_their_films(reader: SearchReader) -> None:
    assert titles(reader, "lincoln") == ["Lincoln", "The Gambler"]


def test_among_equal_matches_the_popular_comes_first(reader: SearchReader) -> None:
    assert titles(reader, "steven spielberg") == ["Schindler's List", "Lincoln"]


@pytest.mark.parametrize(
    ("query", "first"),
    [("schindlre", "Schindler's List"), ("spielburg", "Schindler's List"), ("sigorney weaver", "Alien")],
)
def test_a_typo_is_forgiven_and_said(reader: SearchReader, query: str, first: str) -> None:
    result = reader.search(query)
    assert result.hits[0].body["title"] == first
    assert result.is_close
    assert not reader.search("spielberg").is_close


def test_a_typo_in_a_name_does_not_count_as_one_in_a_title(reader: SearchReader) -> None:
    in_director, in_title = (reader.search(query).hits[0] for query in ("spielburg", "schindlre"))
    assert in_director.body == in_title.body
    assert in_director.score / in_title.score == pytest.approx(1.5 / 4.0)


def test_nonsense_finds_nothing(reader: SearchReader) -> None:
    result = reader.search("xyzzyqwert")
    assert (result.hits, result.total, result.is_close) == ((), 0, False)


def test_the_limit_bounds_the_hits_and_not_the_total(reader: SearchReader) -> None:
    result = reader.search("alien", limit=1)
    assert (len(result.hits), result.total) == (1, 3)


@settings(max_examples=150, deadline=None)
@given(query=st.text(max_size=60) | st.text(alphabet="\"'()[]{}:*?~^+-!&|\\/ AND OR NOT al\ud800", max_size=40))
def test_any_text_is_a_query(folder: Path, query: str) -> None:
    SearchReader(folder).search(query, limit=3)


@pytest.mark.parametrize("query", ["a" * 100_000, "alien " * 10_000, "", "   ", "' OR 1=1 --", "title:alien", "\x00"])
def test_odd_queries_are_answered(reader: SearchReader, query: str) -> None:
    result = reader.search(query)
    assert result.took_s < 5


def test_documents_come_in_the_order_asked_for(reader: SearchReader) -> None:
    assert [hit.key for hit in reader.documents([3, "1", 77, "none"])] == ["3", "1"]


def test_an_index_that_is_not_there_yet_is_an_empty_one(tmp_path: Path) -> None:
    reader = SearchReader(tmp_path / "later")
    assert reader.freshness() is None
    assert reader.spec() is None
    assert reader.search("alien").hits == ()
    assert reader.documents([1]) == []
    assert reader.newest() == []


def test_a_reader_follows_an_index_that_appears_and_is_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    reader = SearchReader(folder)
    assert reader.freshness() is None
    for spec, title in ((SPEC, "Alien"), (SearchIndex("films", text={"title": 1.0}), "Brazil")):
        writer = SearchWriter.open(folder, spec)
        body = {"title": title}
        writer.write([Document(key=1, version=Version(Lsn(1), 0), committed_at=datetime.now(UTC), body=body)])
        writer.flush(up_to=Lsn(1))
        writer.close()
        assert titles(reader, title[:3]) == [title]
        shown = reader.spec()
        assert shown is not None
        assert shown.name == spec.name
        folder.rename(tmp_path / spec.name)
        assert reader.freshness() is None


def test_a_declaration_survives_its_file(reader: SearchReader) -> None:
    assert reader.spec() == SPEC
