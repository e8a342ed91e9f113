"""From what a stranger types to a tantivy query. Pure: words in, query out.

Every word must match somewhere; the last one may be unfinished. Scores are made of constants and
not of word statistics, so that the order can be explained:

    per word, its best path   boost x 1 same word   x 0.8 begins with it   x 0.5 nearly it
    per query, its best path  boost x 2 the whole value   x 0.3 the value begins with it
    times                     log2(2 + damped popularity), between 1 and about 2.3
"""

from collections.abc import Sequence

from tantivy import Occur, Query, Schema

from deltaworks.store.search.terms import FIELD, value_term, word_term

MAX_WORDS = 12

_SAME, _BEGINS, _NEARLY = 1.0, 0.8, 0.5
_WHOLE, _WHOLE_BEGINS = 2.0, 0.3
_FUZZY_FROM_CHARS = 4
_TWO_TYPOS_FROM_CHARS = 8


def build_query(schema: Schema, words: Sequence[str], *, boosts: Sequence[float], whole: str, is_close: bool) -> Query:
    """The query for these words; with `is_close` a typo per word passes, and one word of three or more may miss."""
    words = words[:MAX_WORDS]
    must = [
        _word(schema, word, boosts=boosts, is_last=number == len(words) - 1, is_close=is_close)
        for number, word in enumerate(words)
    ]
    if is_close and len(must) > 2:
        every = Query.boolean_query(
            [(Occur.Should, query) for query in must], minimum_number_should_match=len(must) - 1
        )
    else:
        every = Query.boolean_query([(Occur.Must, query) for query in must])
    return Query.boolean_query([(Occur.Must, every), (Occur.Should, _whole(schema, whole, boosts=boosts))])


def exactly(schema: Schema, term: str) -> Query:
    """The query for the documents with this term; see `terms`."""
    return Query.term_query(schema, FIELD, term, index_option="basic")


def _word(schema: Schema, word: str, *, boosts: Sequence[float], is_last: bool, is_close: bool) -> Query:
    ways: list[Query] = []
    for number, boost in enumerate(boosts):
        term = word_term(number, word)
        ways.append(_scored(exactly(schema, term), boost * _SAME))
        if is_last:
            ways.append(_scored(_begins(schema, term), boost * _BEGINS))
        if is_close and len(word) >= _FUZZY_FROM_CHARS:
            distance = 2 if len(word) >= _TWO_TYPOS_FROM_CHARS else 1
            nearly = Query.fuzzy_term_query(schema, FIELD, term, distance=distance, prefix=is_last)
            ways.append(_scored(nearly, boost * _NEARLY))
    # A word counts once, by its best way; the others decide only between equals.
    return Query.disjunction_max_query(ways, tie_breaker=0.05)


def _whole(schema: Schema, whole: str, *, boosts: Sequence[float]) -> Query:
    ways: list[Query] = []
    for number, boost in enumerate(boosts):
        term = value_term(number, whole)
        same, begins = exactly(schema, term), _begins(schema, term)
        ways += (_scored(same, boost * _WHOLE), _scored(begins, boost * _WHOLE_BEGINS))
    return Query.disjunction_max_query(ways)


def _begins(schema: Schema, term: str) -> Query:
    return Query.fuzzy_term_query(schema, FIELD, term, distance=0, prefix=True)


def _scored(query: Query, score: float) -> Query:
    return Query.const_score_query(query, score)
