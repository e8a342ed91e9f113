"""From a document to what the page shows of it, as the index's `Display` says. Pure.

Everything that comes out is either plain text, which the template escapes, or `Markup` made here
from escaped pieces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from markupsafe import Markup, escape

from deltaworks.store.search import Display, Fact, Hit, SearchResult
from deltaworks.store.search.spec import values_at
from deltaworks.store.search.words import words_of

_WORD = re.compile(r"[^\W_]+(?:['\u2019\u02bc][^\W_]+)*")
_NEAR = 0.75
_SHOWN_PEOPLE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """A labelled list of names: the first ones and all that match; `more` are not shown."""

    label: str
    names: tuple[Markup, ...]
    more: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A hit as the page shows it; empty parts are left out."""

    key: str
    version: str
    title: Markup
    line: tuple[str, ...]
    tags: tuple[Markup, ...]
    facts: tuple[tuple[str, str], ...]
    people: tuple[People, ...]
    details: tuple[tuple[str, str], ...]


def card_of(hit: Hit, display: Display, result: SearchResult) -> Card:
    """The card of a hit; what matched the query is marked."""
    titles = [str(value) for value in values_at(hit.body, display.title)]
    return Card(
        key=hit.key,
        version=f"{hit.version.position}, {hit.version.ordinal}",
        title=marked(", ".join(titles) or hit.key, result),
        line=tuple(text for _, text in _facts(hit.body, display.line)),
        tags=tuple(marked(str(tag), result) for path in display.tags for tag in values_at(hit.body, path)),
        facts=_facts(hit.body, display.facts),
        people=tuple(
            _people(fact.label, [fact_text(fact, value) for value in values], result)
            for fact in display.people
            if (values := values_at(hit.body, fact.path))
        ),
        details=_all_people(hit.body, display) + _facts(hit.body, display.details),
    )


def marked(text: str, result: SearchResult) -> Markup:
    """The text, escaped, with the words that the query found in `<mark>`.

    >>> marked("The <Godfather>", SearchResult(words=("godf",)))
    Markup('The &lt;<mark>Godfather</mark>&gt;')
    """
    pieces = Markup()
    at = 0
    for word in _WORD.finditer(text):
        if _is_match(word[0], result.words, result.is_close):
            pieces += escape(text[at : word.start()]) + Markup("<mark>") + escape(word[0]) + Markup("</mark>")
            at = word.end()
    return pieces + escape(text[at:])


def fact_text(fact: Fact, value: Any) -> str:  # Any: a document is any JSON-like value
    """A value in the fact's form; as it is where the form does not fit its type."""
    try:
        return fact.form.format(value)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError):
        return str(value)


def _facts(body: Any, facts: Sequence[Fact]) -> tuple[tuple[str, str], ...]:
    shown = ((fact, values_at(body, fact.path)) for fact in facts)
    return tuple(
        (fact.label, ", ".join(fact_text(fact, value) for value in values)) for fact, values in shown if values
    )


def _all_people(body: Any, display: Display) -> tuple[tuple[str, str], ...]:
    """Those lists in full that are cut on the card."""
    return tuple(
        (label, text)
        for fact, (label, text) in ((fact, shown) for fact in display.people for shown in _facts(body, [fact]))
        if len(values_at(body, fact.path)) > _SHOWN_PEOPLE
    )


def _people(label: str, names: Sequence[str], result: SearchResult) -> People:
    shown = tuple(
        name
        for number, name in enumerate(marked(name, result) for name in names)
        if number < _SHOWN_PEOPLE or "<mark>" in name
    )
    return People(label=label, names=shown, more=len(names) - len(shown))


@lru_cache(maxsize=20_000)
def _folded(word: str) -> tuple[str, ...]:
    return tuple(words_of(word))


def _is_match(text: str, words: Sequence[str], is_close: bool) -> bool:
    for word in _folded(text):
        if word in words or (words and word.startswith(words[-1])):
            return True
        if is_close and any(_is_near(word, typed) for typed in words):
            return True
    return False


def _is_near(word: str, typed: str) -> bool:
    return word[:1] == typed[:1] and SequenceMatcher(None, word, typed).ratio() >= _NEAR
