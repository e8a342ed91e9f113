"""What an app says about its search index: the searched paths, the weight, the look of a hit.

A *path* is dotted and goes through lists: in `{"cast": [{"name": "Ada"}, {"name": "Bo"}]}` the path
`cast.name` finds `Ada` and `Bo`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.process.sink import Capabilities, SinkReader

if TYPE_CHECKING:
    from deltaworks.store.search.writer import SearchWriter

LAYOUT = 2
"""Grows when the fields of the index change, so that an older index is rebuilt and never misread."""


class SearchSpecError(TerminalError):
    """A declared search index cannot be; the message lists every fault."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A labelled value of a hit; `form` is a format string for it, e.g. `{:.0f} min`."""

    label: str
    path: str
    form: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Display:
    """How a hit looks: `title`, a line under it, tags, facts, people; `details` show when it is opened."""

    title: str
    line: tuple[Fact, ...] = ()
    tags: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    people: tuple[Fact, ...] = ()
    details: tuple[Fact, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `asdict` and JSON made of it."""
        parts = {name: tuple(Fact(**fact) for fact in values[name]) for name in ("line", "facts", "people", "details")}
        return cls(title=values["title"], tags=tuple(values["tags"]), **parts)


@dataclass(frozen=True, slots=True)
class SearchIndex:
    """A search index as an app declares it; a `SinkSpec`.

    `text` maps a path to its boost: a match in a path with a larger boost ranks higher.
    `popularity` is the path of a count (votes, sales): among equal matches the larger comes first.
    An app has one, in `config.index_folder(app)`; `name` is what the search page calls it.

    >>> SearchIndex("movies", text={"title": 3.0, "cast.name": 1.0}).display.title
    'title'
    """

    name: str
    text: Mapping[str, float] = field(kw_only=True)
    popularity: str | None = field(default=None, kw_only=True)
    display: Display = field(default=None, kw_only=True)  # type: ignore[assignment]  # filled below, never None after

    def __post_init__(self) -> None:
        faults = [
            f"boost of {path!r} is {boost!r}; use a number above 0" for path, boost in self.text.items() if boost <= 0
        ]
        if not self.text:
            faults.append("text is empty; name at least one path to search in")
        if not self.name.isidentifier():
            faults.append(f"the name {self.name!r} is no identifier; use letters, digits and _")
        if faults:
            raise SearchSpecError(f"cannot declare the search index {self.name!r}: {'; '.join(faults)}")
        if self.display is None:
            first, *rest = self.text
            object.__setattr__(self, "display", Display(title=first, people=tuple(Fact(path, path) for path in rest)))

    @property
    def capabilities(self) -> Capabilities:
        """Readers see a flush whole; the versions of deleted documents are in it."""
        return Capabilities(
            is_versioned=True, keeps_tombstones=True, is_transactional=True, can_read_back=True, is_in_home=True
        )

    def open(self, *, app: str, key: str, config: Config) -> "SearchWriter":  # noqa: ARG002
        """Take the index in `config.index_folder(app)`, creating it when it is not there.

        Raises:
            IndexHeldError: another writer has it.
            IndexLayoutError: it was built for other paths; the message says how to rebuild it.
        """
        # tantivy is loaded only where an index is opened, so that declaring one stays cheap.
        from deltaworks.store.search.writer import SearchWriter  # noqa: PLC0415

        return SearchWriter.open(config.index_folder(app), self)

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read back what the last flush left."""
        from deltaworks.store.search.read_back import SearchBackReader  # noqa: PLC0415

        return SearchBackReader(config.index_folder(app))

    def to_json(self) -> str:
        """The declaration as it lies beside the index."""
        values = {
            "layout": LAYOUT,
            "name": self.name,
            "text": dict(self.text),
            "popularity": self.popularity,
            "display": asdict(self.display),
        }
        return json.dumps(values, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(
            values["name"],
            text=values["text"],
            popularity=values["popularity"],
            display=Display.from_json(values["display"]),
        )


def values_at(body: Any, path: str) -> list[Any]:  # Any: a document is any JSON-like value
    """Every value at a path, through mappings and lists, in order; nothing where a part is missing or null.

    >>> values_at({"cast": [{"name": "Ada"}, {"name": "Bo"}]}, "cast.name")
    ['Ada', 'Bo']
    """
    found = _flat((body,))
    for name in _names(path):
        # A dict is told apart ten times as fast as a Mapping.
        found = _flat([item.get(name) for item in found if type(item) is dict or isinstance(item, Mapping)])
    return found


@cache
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those of lists among them in their places, without nulls."""
    flat: list[Any] = []
    for value in values:
        if type(value) is list or isinstance(value, (list, tuple)):
            flat += _flat(value)
        elif value is not None:
            flat.append(value)
    return flat
