"""A document as tantivy takes it: the same one in the index of the folder and in a reader's memory."""

import orjson
import tantivy

from deltaworks.store.search.recent import Recent
from deltaworks.store.search.spec import SearchIndex, values_at
from deltaworks.store.search.terms import FIELD, THERE, key_term, terms_of


def entry_of(spec: SearchIndex, document: Recent) -> tantivy.Document:
    """The fields of a document; see `layout`."""
    entry = tantivy.Document()
    entry.add_bytes("key", document.key.encode())
    entry.add_unsigned("position", document.position)
    entry.add_unsigned("ordinal", document.ordinal)
    entry.add_float("popularity", document.popularity)
    terms = [key_term(document.key)]
    if document.body is not None:
        entry.add_bytes("body", document.body)
        terms.append(THERE)
        body = orjson.loads(document.body)
        for number, path in enumerate(spec.text):
            for value in values_at(body, path):
                terms += terms_of(number, str(value))
    for term in terms:
        entry.add_text(FIELD, term)
    return entry
