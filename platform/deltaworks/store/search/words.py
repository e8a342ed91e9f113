"""How text becomes words, the same way for documents, for queries and for marks on the page.

Lower case, without accents, split at everything that is neither letter nor digit. An apostrophe
joins, so `Schindler's` and `schindlers` are one word.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from tantivy import Filter, TextAnalyzer, TextAnalyzerBuilder, Tokenizer

_APOSTROPHES = re.compile("['\u2019\u02bc\u2018`\u00b4]")
_MAX_WORD_BYTES = 100
_MAX_WHOLE_CHARS = 200


@cache
def _analyzer() -> TextAnalyzer:
    builder = TextAnalyzerBuilder(Tokenizer.simple())
    for step in (Filter.remove_long(_MAX_WORD_BYTES), Filter.lowercase(), Filter.ascii_fold()):
        builder = builder.filter(step)
    return builder.build()


def words_of(text: str) -> list[str]:
    """The words of a text.

    >>> words_of("Amélie's 3rd Spider-Man")
    ['amelies', '3rd', 'spider', 'man']
    """
    return _analyzer().analyze(_APOSTROPHES.sub("", text if text.isascii() else _composed(text)))


def whole_of(words: Sequence[str]) -> str:
    """The words as the one term of a whole value; cut, since nobody types more.

    >>> whole_of(words_of("The God-father!"))
    'the god father'
    """
    return " ".join(words)[:_MAX_WHOLE_CHARS]


def _composed(text: str) -> str:
    # A lone surrogate can come out of a URL or of JSON, and the index takes valid Unicode only.
    return unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode("utf-8"))
