"""The page as HTML: what it shows, that it works without JavaScript, and that nothing gets out of its place."""

import re
from html.parser import HTMLParser

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve.conftest import ALIEN, SPEC

from deltaworks.position import Lsn, Version
from deltaworks.serve.card import card_of, fact_text, marked
from deltaworks.store.search import Fact, Hit, SearchResult


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marked: list[str] = []
        self._in_mark = False
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_mark = tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self._in_mark = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_mark:
            self.marked.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def by_id(self, name: str) -> dict[str, str | None]:
        return next(attributes for _, attributes in self.elements if attributes.get("id") == name)


def get(client: httpx.Client, path: str, query: str = "") -> Page:
    return Page(client.get(path, params={"q": query} if query else {}).raise_for_status().text)


def test_a_film_is_shown_with_what_its_declaration_says(client: httpx.Client) -> None:
    page = get(client, "/", "weaver")
    for shown in (
        "1 result",
        "Alien 1979 · R · 117 min",
        "8.5",
        "900,000",
        "directed by Ridley Scott",
        "with Bolaji Badejo, Harry Dean Stanton, Helen Horton, Ian Holm, John Hurt, Sigourney Weaver and 3 more",
        "Horror",
        "$81,900,459",
        "1979-05-25",
        "0/64",
    ):
        assert shown in page.text
    assert page.marked == ["Weaver"]
    assert page.by_id("q")["value"] == "weaver"


def test_a_name_that_matches_is_shown_even_where_the_list_is_cut(client: httpx.Client) -> None:
    page = get(client, "/", "kotto")
    assert "Sigourney Weaver, Yaphet Kotto and 2 more" in page.text
    assert page.marked == ["Kotto"]


def test_the_part_that_is_replaced_while_typing_is_the_same_as_in_the_page(client: httpx.Client) -> None:
    whole = client.get("/", params={"q": "alien"}).text
    part = client.get("/results", params={"q": "alien"}).text
    assert part.strip() in whole
    assert "<html" not in part


def test_without_a_query_it_shows_what_changed_last(client: httpx.Client) -> None:
    page = get(client, "/")
    assert "Changed last" in page.text
    assert len(page.all("details")) == 2
    assert "autofocus" in page.by_id("q")


def test_nothing_found_is_said_with_a_next_step(client: httpx.Client) -> None:
    page = get(client, "/", "zzzzqqq")
    assert "Nothing matches “zzzzqqq”." in page.text
    assert "another spelling" in page.text
    assert page.all("details") == []


def test_a_typo_is_said(client: httpx.Client) -> None:
    page = get(client, "/", "sigourny weever")
    assert "No exact match; 1 similar result" in page.text
    assert page.marked == ["Sigourney", "Weaver"]


def test_it_says_how_fresh_it_is(client: httpx.Client) -> None:
    text = get(client, "/").text
    assert re.search(r"2 documents · position 0/64 · up to date with the log · newest change [\d.]+ (s|min) ago", text)


def test_it_works_with_keyboard_and_screen_reader(client: httpx.Client) -> None:
    page = get(client, "/", "alien")
    assert page.all("html") == [{"lang": "en"}]
    assert {"for": "q", "class": "away"} in page.all("label")
    assert page.all("form")[0]["role"] == "search"
    assert page.by_id("q")["aria-controls"] == "results"
    assert any(element.get("aria-live") == "polite" for element in page.all("p"))
    assert len(page.all("summary")) == len(page.all("details")) == 1
    assert "autofocus" not in page.by_id("q")


def test_it_works_without_javascript(client: httpx.Client) -> None:
    form = get(client, "/").all("form")[0]
    assert (form["action"], form["method"]) == ("/", "get")
    assert any(button.get("type") == "submit" for button in get(client, "/").all("button"))


@pytest.mark.parametrize("path", ["/", "/results"])
@pytest.mark.parametrize("query", ["", "script", "eve", "bold", '"><script>alert(3)</script>', "</title><img src=x>"])
def test_nothing_of_a_document_or_a_query_becomes_markup(client: httpx.Client, path: str, query: str) -> None:
    page = get(client, path, query)
    allowed = {"/static/page.js"} if path == "/" else set()
    assert {script.get("src") for script in page.all("script")} == allowed
    for tag in ("img", "iframe", "b", "i"):
        assert page.all(tag) == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)


def test_the_hostile_film_is_shown_as_text(client: httpx.Client) -> None:
    text = get(client, "/", "alert").text
    assert '<script>alert(1)</script> & "quotes" \'n' in text
    assert "<img src=x onerror=alert(2)>" in text
    assert "Eve <iframe> O'Nil" in text


@given(text=st.text(max_size=80), words=st.lists(st.text(min_size=1, max_size=5), max_size=3), close=st.booleans())
def test_marks_change_no_text(text: str, words: list[str], close: bool) -> None:
    html = str(marked(text, SearchResult(words=tuple(words), is_close=close)))
    assert set(re.findall(r"<[^>]*>", html)) <= {"<mark>", "</mark>"}
    assert "<" not in marked(text, SearchResult()).replace("<mark>", "").replace("</mark>", "")
    assert (
        marked(text, SearchResult(words=tuple(words), is_close=close)).striptags()
        == marked(text, SearchResult()).striptags()
    )


@pytest.mark.parametrize(
    ("text", "words", "html"),
    [
        ("Amélie", ("amel",), "<mark>Amélie</mark>"),
        ("Schindler's List", ("schindlers", "li"), "<mark>Schindler&#39;s</mark> <mark>List</mark>"),
        ("Alien Nation", ("alien", "x"), "<mark>Alien</mark> Nation"),
        ("Aliens", ("alien", "x"), "Aliens"),
        ("Spider-Man", ("spider", "m"), "<mark>Spider</mark>-<mark>Man</mark>"),
    ],
)
def test_marks_are_on_the_words_that_the_search_found(text: str, words: tuple[str, ...], html: str) -> None:
    assert str(marked(text, SearchResult(words=words))) == html


def test_a_value_that_does_not_fit_its_form_is_shown_as_it_is() -> None:
    assert fact_text(Fact("runtime", "r", "{:.0f} min"), 117.2) == "117 min"
    assert fact_text(Fact("runtime", "r", "{:.0f} min"), "unknown") == "unknown"
    assert fact_text(Fact("runtime", "r", "{:.0f} {missing}"), 3) == "3"


def test_an_empty_document_is_a_card_with_its_key() -> None:
    hit = Hit(key="7", version=Version(Lsn(1), 0), body={})
    card = card_of(hit, SPEC.display, SearchResult())
    assert (str(card.title), card.line, card.facts, card.people, card.tags, card.details) == ("7", (), (), (), (), ())


def test_the_lists_that_are_cut_are_whole_in_the_details() -> None:
    card = card_of(Hit(key="7", version=Version(Lsn(1), 0), body=ALIEN), SPEC.display, SearchResult())
    assert dict(card.details)["with"].endswith("Veronica Cartwright, Yaphet Kotto")
    assert "directed by" not in dict(card.details)
