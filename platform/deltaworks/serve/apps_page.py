"""The page of apps as HTML: one rendering for the whole page and for the part that is replaced while one looks."""

from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from markupsafe import Markup

from deltaworks.process.asked import Asking
from deltaworks.process.letters import Letter
from deltaworks.process.live import HISTORY
from deltaworks.process.sink import key_text
from deltaworks.serve.apps import AppView
from deltaworks.serve.page import span, template

_WIDTH, _HEIGHT = 240.0, 40.0
_STATE_TEXTS = {
    "running": "running",
    "paused": "paused",
    "silent": "does not answer",
    "stopped": "no service",
}
_MEMBER_TEXTS = _STATE_TEXTS | {"stopped": "no process", "elsewhere": "on another machine"}
_VERBS = {"filter": "keeps", "enrich": "asks", "transform": "makes", "on_change": "tells", "window": "aggregates"}


def render_apps(apps: Sequence[AppView], *, has_search: bool, may_act: bool, ask: str = "") -> str:
    """The whole page; with the question of that id open, where there is one: so it is asked without JavaScript."""
    asked = ask if may_act and any(ask in questions(app) for app in apps) else ""
    return _render("apps.html", apps, has_search=has_search, may_act=may_act, asked=asked)


def render_list(apps: Sequence[AppView], *, may_act: bool) -> str:
    """The apps alone."""
    return _render("apps_list.html", apps, has_search=False, may_act=may_act)


def questions(app: AppView) -> list[str]:
    """The ids of what an operator may be asked about an app."""
    drops = [drop_question(app, letter) for letter in app.letters if app.may_see_to(letter)]
    return drops if app.is_shared or app.is_reprocessed else [anew_question(app), *drops]


def anew_question(app: AppView) -> str:
    """The id of the question whether all documents are to be made anew."""
    return f"sure-anew-{app.name}"


def drop_question(app: AppView, letter: Letter) -> str:
    """The id of the question whether a letter is to be dropped."""
    return f"sure-{app.name}-{letter_id(letter)}"


def _render(name: str, apps: Sequence[AppView], *, has_search: bool, may_act: bool, asked: str = "") -> str:
    return template(name).render(
        apps=apps,
        has_search=has_search,
        may_act=may_act,
        asked=asked,
        questions=questions,
        anew_question=anew_question,
        drop_question=drop_question,
        state_text=state_text,
        member_texts=_MEMBER_TEXTS,
        members_text=members_text,
        since=span,
        verbs=_VERBS,
        graph=graph,
        rate=rate,
        seconds=seconds,
        percent=percent,
        ago=ago,
        asked_text=asked_text,
        letter_id=letter_id,
    )


def state_text(app: AppView, *, now: datetime | None = None) -> str:
    """What the app is doing, in a few words."""
    now = now or datetime.now(UTC)
    text = _STATE_TEXTS[app.state]
    if app.paused_since is not None:
        return f"{text} for {span((now - app.paused_since).total_seconds())}"
    if app.live is not None and app.state == "running":
        return f"{text} for {span((now - app.live.started_at).total_seconds())}"
    if app.live is not None and app.state == "silent":
        return f"{text} since {span((now - app.live.at).total_seconds())}"
    return text


def members_text(app: AppView) -> str:
    """How many members of a shared app do its work, and where."""
    here = sum(each.member.pid is not None for each in app.members)
    elsewhere = sum(each.state == "elsewhere" for each in app.members)
    waiting = sum(len(each.member.waiting) for each in app.members)
    texts = [f"{here} member{'s' if here != 1 else ''} here"]
    texts += [f"{elsewhere} elsewhere"] if elsewhere else []
    texts += [f"{waiting} share{'s wait' if waiting != 1 else ' waits'} for a member"] if waiting else []
    return " · ".join(texts)


def graph(history: Sequence[float]) -> Markup:
    """The documents of the last two minutes as an area; the newest second is at the right edge."""
    most = max(history, default=0.0) or 1.0
    step = _WIDTH / (HISTORY - 1)
    left = _WIDTH - step * (len(history) - 1)
    points = [
        f"{left + index * step:.1f},{_HEIGHT - 1 - (value / most) * (_HEIGHT - 4):.1f}"
        for index, value in enumerate(history)
    ]
    if not points:
        return Markup()
    line = " ".join(points)
    area = f"{left:.1f},{_HEIGHT} {line} {_WIDTH},{_HEIGHT}"
    # Only numbers go in, so there is nothing to escape.
    return Markup(f'<polygon class="area" points="{area}"/><polyline class="line" points="{line}"/>')  # noqa: S704


def rate(per_s: float) -> str:
    """A rate for people, `1,240` or `0.4`.

    >>> rate(1240.4), rate(0.44), rate(0)
    ('1,240', '0.4', '0')
    """
    return f"{per_s:,.0f}" if per_s >= 10 or not per_s else f"{per_s:.1f}"


def seconds(value: float | None) -> str:
    """A short time for people: `1.2 s`, `45 ms`, `0.3 ms`.

    >>> seconds(1.234), seconds(0.0452), seconds(0.00031)
    ('1.2 s', '45 ms', '0.3 ms')
    """
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.001 else f"{value * 1e3:.1f} ms"


def percent(share: float | None) -> str:
    """A share for people."""
    return "–" if share is None else f"{share:.1%}" if share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def asked_text(app: AppView) -> str:
    """What was asked of the app and has not ended, with how far it is."""
    texts = []
    for request in app.asked:
        asking = app.asking.get(request.id)
        texts.append(f"{request.kind.value} {_progress(asking)}" if asking is not None else request.kind.value)
    return ", ".join(texts)


def letter_id(letter: Letter) -> str:
    """A name for a letter's elements: the same at the next look, whatever came or went above it."""
    return f"{quote(key_text(letter.key))}-{letter.version.position.value}-{letter.version.ordinal}-{letter.step}"


def _progress(asking: Asking) -> str:
    return f"({asking.total - asking.left:,} of {asking.total:,} done)"


def ago(at: datetime | None) -> str:
    """How long ago something was."""
    return "" if at is None else f"{span(max(0.0, (datetime.now(UTC) - at).total_seconds()))} ago"
