"""The search page as HTML. One rendering for the whole page and for the part that is replaced while typing."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from deltaworks.serve.card import Card, card_of
from deltaworks.serve.status import Status
from deltaworks.store.search import SearchIndex, SearchReader, SearchResult

PAGE_HITS = 20
_NEWEST_HITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the list of results shows."""

    query: str
    result: SearchResult
    spec: SearchIndex | None
    is_newest: bool = False


def find(search: SearchReader, query: str, *, limit: int = PAGE_HITS) -> Found:
    """Search for what was typed; without a word in it, the documents that changed last."""
    query = query.strip()
    result = search.search(query, limit)
    if not result.words:
        newest = search.newest(_NEWEST_HITS)
        return Found(query=query, result=SearchResult(hits=tuple(newest)), spec=search.spec(), is_newest=True)
    return Found(query=query, result=result, spec=search.spec())


def render_page(found: Found, *, app: str, status: Status) -> str:
    """The whole page."""
    return template("page.html").render(
        found=found,
        cards=_cards(found),
        title=_headline(found.spec, app),
        searched=_searched(found.spec),
        status=status,
        status_text=status_text(status),
    )


def render_results(found: Found) -> str:
    """The list of results alone."""
    return template("results.html").render(found=found, cards=_cards(found))


def status_text(status: Status, *, now: datetime | None = None) -> str:
    """The freshness line: how many documents, up to where, how far behind."""
    if not status.is_ready:
        return "Nothing is indexed yet. Documents appear here as soon as the app has written the first ones."
    if status.lag_changes:
        most = "at least " if status.is_lag_at_least else ""
        behind = f"{most}{_counted(status.lag_changes, 'change')} behind, for {span(status.lag_s)}"
    else:
        behind = "up to date with the log"
    parts = [_counted(status.document_count, "document"), f"position {status.index_position}", behind]
    if status.committed_at is not None:
        age_s = ((now or datetime.now(UTC)) - status.committed_at).total_seconds()
        parts.append(f"newest change {span(max(0.0, age_s))} ago")
    return " · ".join(parts)


@cache
def _templates() -> Environment:
    # Everything is escaped unless it is `Markup`, whatever the file is called.
    return Environment(
        loader=PackageLoader("deltaworks.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template(name: str) -> Template:
    """A template of the server by its file's name."""
    return _templates().get_template(name)


def _cards(found: Found) -> list[Card]:
    if found.spec is None:
        return []
    return [card_of(hit, found.spec.display, found.result) for hit in found.result.hits]


def _headline(spec: SearchIndex | None, app: str) -> str:
    return (spec.name if spec else app).replace("_", " ").capitalize()


def _searched(spec: SearchIndex | None) -> str:
    """`title, directors or cast`, from the paths that are searched."""
    names = list(dict.fromkeys(path.partition(".")[0].replace("_", " ") for path in spec.text)) if spec else []
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "anything"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """A length of time for people."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
