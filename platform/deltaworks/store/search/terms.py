"""The terms of the index: all that is looked for is in one field, and a mark before each says what it is.

| term                           | who has it                                                |
|--------------------------------|-----------------------------------------------------------|
| mark of keys, key              | every document, tombstones too                            |
| mark of those that are there   | every document that is no tombstone                       |
| mark of words at path n, word  | documents with the word at that path of `SearchIndex.text` |
| mark of values at path n, value | documents with that value there: for "is", and "begins with" |

Marks are characters for private use, so no word has one in it. That of a path has three: a query that allows for two
typos cannot come from one path into another.
"""

from functools import lru_cache

from deltaworks.store.search.words import whole_of, words_of

FIELD = "terms"

_FIRST_MARK = 0xF0000
"""The first of the 65,534 characters of the plane."""

THERE = chr(_FIRST_MARK)
"""The one term that says that a document is no tombstone."""
_KEY = chr(_FIRST_MARK + 1)
_PATHS = _FIRST_MARK + 2


def key_term(key: str) -> str:
    """The term of the document of this key."""
    return _KEY + key


def word_term(path: int, word: str) -> str:
    """The term of a word at the path of this number."""
    return chr(_PATHS + 2 * path) * 3 + word


def value_term(path: int, whole: str) -> str:
    """The term of a whole value at the path of this number; see `words.whole_of`."""
    return chr(_PATHS + 2 * path + 1) * 3 + whole


@lru_cache(maxsize=50_000)
def terms_of(path: int, text: str) -> tuple[str, ...]:
    """The terms of a value at the path of this number: each of its words, and all of it."""
    # Names come again and again; taking one from here is ten times cheaper than analysing it.
    words = words_of(text)
    return (*(word_term(path, word) for word in words), value_term(path, whole_of(words)))
