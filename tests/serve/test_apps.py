"""The page of apps: what it shows of running, paused and absent services, and who may act on it."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import httpx
import pytest
from process.material import INT, TEXT, create, table_schema, wait_until
from serve.conftest import InProcess

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.process.app import App, Source, count
from deltaworks.process.entity import Entity
from deltaworks.process.live import read_live
from deltaworks.process.pausing import AppPausedError
from deltaworks.serve.http import build
from deltaworks.testing.changes import Feed
from deltaworks.testing.memory_sink import MemorySink
from deltaworks.testing.postgres import free_port

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=INT)
DAYS = {"Alien": date(1979, 5, 25), "Gilda": date(1979, 6, 1)}
HOSTILE = "<script>alert(1)</script>"
REFRESH = '<noscript><meta http-equiv="refresh"'
QUESTION = re.compile(r'name="ask" value="([^"]+)"')


class Film(TypedDict):
    title: str


class Role(TypedDict):
    role_id: int


class Broken:
    """What the step of the app under test does."""

    is_on = True
    title: str | None = None


def film_app(sink: MemorySink, broken: Broken) -> App:
    studio = Source("studio")
    films = App("films", key="film_id", sources=[studio.table("film", schema=Film), studio.table("role", schema=Role)])

    @films.filter
    def is_listed(film: Entity[Film]) -> bool:
        return film.after["title"] != "draft"

    @films.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        if broken.is_on and film.key == 13:
            raise ValueError
        return {"title": broken.title or film.after["title"]}

    films.sink(sink)
    return films


class Bench:
    """An app over a local log, and the server over the same home."""

    def __init__(self, home: Path, **serve: Any) -> None:
        self.sink, self.broken = MemorySink("films"), Broken()
        module = ModuleType("films_on_the_page")
        module.films = film_app(self.sink, self.broken)  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        self.config = Config.model_validate(
            {
                "home": home,
                "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["film"]}},
                "apps": {"films": {"module": "films_on_the_page:films", "source": "studio"}},
                "serve": serve,
            }
        )

    def commit(self, *keys: int, title: str = "Alien") -> None:
        with LocalLogWriter.open(self.config.log_folder("studio")) as writer:
            Feed(writer).commit(*(create(FILM, film_id=key, title=title) for key in keys))

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            service = pool.submit(operate.follow_process, self.config, "films", stop=stop)
            try:
                yield
            finally:
                stop.set()
            service.result()


class Page(InProcess):
    """The page of apps."""

    def app(self) -> dict[str, Any]:
        [app] = self.ask("GET", "/api/apps").json()["apps"]
        return dict(app)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)
    del sys.modules["films_on_the_page"]


@pytest.fixture
def page(bench: Bench) -> Page:
    return Page(build(bench.config))


def test_an_app_without_a_service_shows_what_waits_for_it(bench: Bench, page: Page) -> None:
    bench.commit(1, 2, 13)

    assert (page.app()["state"], page.app()["behind"], page.app()["live"]) == ("stopped", 3, None)
    # Typed into the address bar, a page comes from no site.
    text = page.ask("GET", "/apps", {"sec-fetch-site": "none"}).text
    assert "pause or resume" in text
    assert "no service" in text
    assert "deltaworks process films" in text


def test_a_configuration_without_a_search_index_leads_to_the_page_of_apps(page: Page) -> None:
    answer = page.ask("GET", "/")

    assert (answer.status_code, answer.headers["location"]) == (307, "/apps")
    assert page.ask("GET", "/api/search").status_code == 404
    assert page.ask("GET", "/metrics").status_code == 200


def test_a_running_app_shows_its_steps_rates_and_dead_letters(bench: Bench, page: Page) -> None:
    bench.commit(*range(20))
    bench.commit(50, title="draft")
    with bench.running():
        wait_until(lambda: len(bench.sink.bodies) == 19)
        wait_until(lambda: (live := page.app()["live"]) is not None and live["documents"] == 20)
        app, text = page.app(), page.ask("GET", "/apps").text

    assert (app["state"], app["dead"], app["behind"]) == ("running", 1, 0)
    steps = {step["name"]: step for step in app["live"]["steps"]}
    assert (steps["is_listed"]["taken"], steps["is_listed"]["filtered"]) == (21, 1)
    assert (steps["document"]["out"], steps["document"]["failed"]) == (19, 1)
    assert steps["document"]["p99_s"] > 0
    assert app["live"]["lag_p99_s"] is not None
    assert "ValueError at" in text
    assert "is_listed" in text
    assert page.app()["state"] == "stopped"


def test_an_operator_pauses_resumes_and_retries(bench: Bench, page: Page) -> None:
    with bench.running():
        bench.commit(13)
        wait_until(lambda: page.app()["dead"] == 1)
        answer = page.ask("POST", "/apps/films/pause")
        assert (answer.status_code, answer.headers["location"]) == (303, "/apps#app-films")
        assert page.app()["state"] == "paused"

        bench.broken.is_on = False
        page.ask("POST", "/apps/films/retry?key=13", {"sec-fetch-site": "same-origin"})
        assert page.app()["requests"] == ["retry"]
        bench.commit(1)
        page.ask("POST", "/apps/films/resume", {"origin": "http://127.0.0.1:8400"})
        wait_until(lambda: bench.sink.bodies.keys() == {1, 13})

    assert (page.app()["dead"], page.app()["requests"]) == (0, [])


def test_an_operator_drops_one_letter_and_never_all_at_once(bench: Bench, page: Page) -> None:
    with bench.running():
        bench.commit(13)
        wait_until(lambda: page.app()["dead"] == 1)
        assert "Drop for good" in page.ask("GET", "/apps").text
        refused = page.ask("POST", "/apps/films/drop")
        assert (refused.status_code, "deltaworks dead drop films --all" in refused.text) == (409, True)
        page.ask("POST", "/apps/films/drop?key=13")
        wait_until(lambda: page.app()["dead"] == 0)
        bench.broken.is_on = False
        bench.commit(1)
        wait_until(lambda: bench.sink.bodies.keys() == {1})
    # Nothing of it comes back: another service finds it settled.
    operate.process(bench.config, "films")
    assert bench.sink.bodies.keys() == {1}


def test_an_operator_makes_every_document_anew_once(bench: Bench, page: Page) -> None:
    bench.commit(*range(5))
    operate.process(bench.config, "films")
    bench.broken.title = "New"
    for _ in range(2):
        assert page.ask("POST", "/apps/films/reprocess").status_code == 303
    assert page.app()["requests"] == ["reprocess"]
    assert "disabled>Reprocess</button>" in page.ask("GET", "/apps").text

    with bench.running():
        wait_until(lambda: page.app()["requests"] == [])

    assert {body["title"] for body in bench.sink.bodies.values()} == {"New"}


def test_a_question_stays_open_without_javascript_until_it_is_answered(bench: Bench, page: Page) -> None:
    bench.commit(13, *range(20, 30))
    operate.process(bench.config, "films")
    first = page.ask("GET", "/apps").text
    assert open_question(first) is None
    assert REFRESH in first
    anew, drop = QUESTION.findall(first)

    for ask, title in ((anew, "Make every document of films anew?"), (drop, "Drop what failed for 13?")):
        # What is asked is in the address, so a reload asks it again; nothing reloads while somebody reads it.
        for _ in range(2):
            asked = page.ask("GET", "/apps", params={"ask": ask}).text
            assert title in (open_question(asked) or "")
            assert REFRESH not in asked
        assert "sure" not in (open_question(page.ask("GET", "/apps/list").text) or "")

    # Its "no" is a way back to the page without it, and its answer leads there too.
    assert '<form method="get" action="/apps#app-films"><button autofocus>Keep it</button></form>' in asked
    answer = page.ask("POST", "/apps/films/drop?key=13")
    assert answer.headers["location"] == "/apps#app-films"
    operate.process(bench.config, "films")
    # A question that is none any more is not asked, and the page is live again.
    gone = page.ask("GET", "/apps", params={"ask": drop}).text
    assert open_question(gone) is None
    assert REFRESH in gone


def test_a_question_about_a_letter_is_seen_among_many(bench: Bench, page: Page) -> None:
    films = sys.modules["films_on_the_page"].films

    @films.transform
    def fails(film: Entity[Film]) -> dict[str, Any]:
        raise ValueError

    bench.commit(*range(40, 50))
    operate.process(bench.config, "films")
    listed = page.ask("GET", "/apps").text
    assert '<details id="letters-films">' in listed
    *_, last = QUESTION.findall(listed)
    assert '<details id="letters-films" open>' in page.ask("GET", "/apps", params={"ask": last}).text


@pytest.mark.parametrize("ask", [HOSTILE, "sure-anew-nobody", "app-films", '" autofocus onfocus="x'])
def test_only_a_question_that_there_is_can_be_asked(bench: Bench, page: Page, ask: str) -> None:
    bench.commit(1)
    text = page.ask("GET", "/apps", params={"ask": ask}).text
    assert open_question(text) is None
    assert ask not in text.replace('id="app-films"', "").replace('"/apps#app-films"', "")
    # Nor by one who may not act.
    known = page.ask("GET", "/apps", {"sec-fetch-site": "same-origin"}, params={"ask": "sure-anew-films"}).text
    stranger = Page(build(bench.config), client="203.0.113.9")
    assert open_question(known) is not None
    assert open_question(stranger.ask("GET", "/apps", params={"ask": "sure-anew-films"}).text) is None


def open_question(text: str) -> str | None:
    """The one that a page shows, as HTML."""
    found = re.findall(r'<div class="sure open".*?</h3>', text, flags=re.DOTALL)
    assert len(found) <= 1
    return found[0] if found else None


def test_a_shared_app_is_not_reprocessed_here(bench: Bench) -> None:
    films = bench.config.app("films").model_copy(update={"shares": 4})
    page = Page(build(bench.config.model_copy(update={"apps": {"films": films}})))

    assert page.ask("POST", "/apps/films/reprocess").status_code == 409
    assert "Reprocess" not in page.ask("GET", "/apps").text


def test_a_paused_app_takes_nothing_over_a_restart_and_says_so(bench: Bench) -> None:
    operate.pause(bench.config, "films")
    with bench.running():
        bench.commit(1)
        wait_until(lambda: read_live(bench.config.app_folder("films")) is not None)
        for ask in (operate.process, operate.reprocess):
            with pytest.raises(AppPausedError, match="is paused since"):
                ask(bench.config, "films")
    with pytest.raises(AppPausedError, match="deltaworks process films --resume"):
        operate.process(bench.config, "films")
    assert bench.sink.bodies == {}

    operate.resume(bench.config, "films")
    operate.process(bench.config, "films")
    assert bench.sink.bodies.keys() == {1}


@pytest.mark.parametrize("action", ["pause", "drop?key=13", "reprocess"])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
    ],
)
def test_another_sites_page_cannot_act(page: Page, headers: dict[str, str], action: str) -> None:
    assert page.ask("POST", f"/apps/films/{action}", headers).status_code == 403
    assert page.ask("GET", f"/apps/films/{action}").status_code == 405
    assert (page.app()["state"], page.app()["requests"]) == ("stopped", [])


@pytest.mark.parametrize(
    ("operators", "client", "host", "status"),
    [
        ("this machine", "10.0.0.7", "127.0.0.1:8400", 403),
        ("this machine", "127.0.0.1", "rebound.example:8400", 403),
        ("this machine", "::1", "localhost:8400", 303),
        ("anyone", "10.0.0.7", "console.example", 303),
        ("nobody", "127.0.0.1", "127.0.0.1:8400", 403),
    ],
)
def test_who_may_act_is_configured_and_others_see_no_buttons(
    tmp_path: Path, operators: str, client: str, host: str, status: int
) -> None:
    page = Page(build(Bench(tmp_path, operators=operators).config), client=client, host=host)

    assert page.ask("POST", "/apps/films/pause").status_code == status
    assert ("<button" in page.ask("GET", "/apps").text) == (status == 303)


def test_what_is_not_there_is_named(page: Page) -> None:
    answer = page.ask("POST", "/apps/film/pause")

    assert (answer.status_code, "known: apps films; actions pause, resume, retry, drop, reprocess" in answer.text) == (
        404,
        True,
    )


def test_a_hostile_key_and_error_are_only_text(bench: Bench, page: Page) -> None:
    text = table_schema("film", "film_id", film_id=TEXT, title=TEXT)
    bench.commit()
    with LocalLogWriter.open(bench.config.log_folder("studio")) as writer:
        Feed(writer).commit(create(text, film_id=HOSTILE, title="Alien"))
    module = sys.modules["films_on_the_page"]

    @module.films.filter
    def fails(film: Entity[Film]) -> bool:
        raise ValueError(film.key)

    operate.process(bench.config, "films")

    shown = page.ask("GET", "/apps").text
    assert HOSTILE not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "key=%3Cscript%3E" in shown


def test_what_dedup_holds_back_and_how_many_windows_there_are_is_shown(bench: Bench, page: Page) -> None:
    films = sys.modules["films_on_the_page"].films
    films.transform(lambda film: film | {"day": DAYS[film["title"]]})
    films.dedup("title", "day")
    films.window(time="day", size=timedelta(days=1), by="title", lateness=timedelta(0), films=count())
    bench.broken.is_on = False
    port = free_port()
    with operate.app_metrics_server(bench.config, "films", port=port), bench.running():
        bench.commit(1, title="Alien")
        bench.commit(2, title="Gilda")
        wait_until(lambda: len(bench.sink.bodies) == 2)
        for key, title in ((2, "Gilda"), (3, "Alien")):
            bench.commit(key, title=title)
        wait_until(lambda: (step_of(page, "window") or {}).get("late") == 1)
        dedup, window = step_of(page, "dedup"), step_of(page, "window")
        text = page.ask("GET", "/apps").text
        scrape = httpx.get(f"http://127.0.0.1:{port}/metrics").text

    assert (dedup["same"], dedup["filtered"]) == (1, 0)
    assert (window["windows_open"], window["windows_closed"]) == (1, 1)
    assert "1 the same" in text
    assert '1 open · 1 closed · <span class="late">1 late</span>' in text
    assert 'deltaworks_process_windows{app="films",state="closed",step="window"} 1.0' in scrape
    assert 'deltaworks_process_step_total{app="films",outcome="same",step="dedup"}' in scrape
    assert 'deltaworks_process_step_total{app="films",outcome="late",step="window"}' in scrape


def step_of(page: Page, name: str) -> dict[str, Any] | None:
    live = page.app()["live"]
    return None if live is None else next(step for step in live["steps"] if step["name"] == name)


def test_metrics_of_a_running_app_are_on_its_own_port(bench: Bench) -> None:
    port = free_port()
    bench.commit(1, 13)
    with operate.app_metrics_server(bench.config, "films", port=port), bench.running():
        wait_until(lambda: len(bench.sink.bodies) == 1)
        scrape: Callable[[], str] = lambda: httpx.get(f"http://127.0.0.1:{port}/metrics").text  # noqa: E731
        wait_until(lambda: 'deltaworks_process_keys{app="films",standing="dead"} 1.0' in scrape())
        text = scrape()

    assert 'deltaworks_process_step_seconds_count{app="films",step="document"}' in text
    assert 'deltaworks_process_step_total{app="films",outcome="failed",step="document"}' in text
