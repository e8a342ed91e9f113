"""The embedded search index: a tantivy index that an app fills and a search page reads.

SearchIndex   what an app declares: which parts of a document are searched, and how a hit is shown
SearchWriter  the sink: versions and tombstones live in the index itself
SearchReader  searches while another process writes
"""

from deltaworks.store.search.reader import Freshness, Hit, SearchReader, SearchResult
from deltaworks.store.search.spec import Display, Fact, SearchIndex
from deltaworks.store.search.writer import SearchWriter

__all__ = ["Display", "Fact", "Freshness", "Hit", "SearchIndex", "SearchReader", "SearchResult", "SearchWriter"]
