"""The embedded search index: a tantivy index that an app fills and a search page reads.

SearchIndex   what an app declares: which parts of a document are searched, and how a hit is shown
SearchWriter  the sink: a flush is durable and seen at once, and in tantivy's index a second later
SearchReader  searches while another process writes
"""

from deltaworks.store.search.reader import Freshness, Hit, SearchReader, SearchResult
from deltaworks.store.search.spec import Display, Fact, SearchIndex
from deltaworks.store.search.writer import SearchWriter

__all__ = ["Display", "Fact", "Freshness", "Hit", "SearchIndex", "SearchReader", "SearchResult", "SearchWriter"]
