"""The HTTP server: a page of all apps, the search page over one app's index, JSON, health and metrics.

| route            | answers                                                                  |
|------------------|--------------------------------------------------------------------------|
| `/?q=`           | the page, with results rendered; it works without JavaScript             |
| `/results?q=`    | its list of results alone, for typing                                    |
| `/api/search`    | `q`, `limit`: the best hits                                              |
| `/api/documents` | `key`, repeated: these documents, those that are there                   |
| `/api/status`    | index position, end of the log, lag, document count                      |
| `/apps`          | the page of apps, also without JavaScript; `?ask=` has a question open   |
| `/apps/list`     | its list of apps alone, for looking on                                   |
| `/api/apps`      | the same as JSON                                                         |
| `/apps/A/pause`  | POST, as `resume`, `retry`, `drop` and `reprocess`: see `operator`        |
| `/health`        | 200 while the process serves                                             |
| `/metrics`       | Prometheus text                                                          |

Without an app that has a search index, `/` leads to `/apps` and there is no search. It reads files that other
processes write, so it starts before them and outlives them.
"""

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from importlib.resources import as_file, files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from granian.log import LogLevels
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.middleware.base import RequestResponseEndpoint

from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, TerminalError
from deltaworks.log.registry import log_of
from deltaworks.log.status import CaptureStatus, log_status
from deltaworks.position import Lsn
from deltaworks.process.registry import load_app
from deltaworks.serve.apps import Apps
from deltaworks.serve.apps_page import render_apps, render_list
from deltaworks.serve.metrics import Metrics
from deltaworks.serve.operator import add_actions, stranger
from deltaworks.serve.page import find, render_page, render_results, status_text
from deltaworks.serve.status import Status, read_status
from deltaworks.serve.worker import serve
from deltaworks.store.search import Hit, SearchIndex, SearchReader

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class NoAppToServeError(TerminalError):
    """The configuration does not say whose index to serve."""


def build(config: Config) -> FastAPI:
    """The application. Opens nothing: an index or a log that is not there yet is a state it shows.

    Raises:
        NoAppToServeError: `serve.app` is left out and several apps have a search index.
    """
    name = _searched_app(config)
    # No interactive API pages: they load scripts from another site.
    app = FastAPI(title="Deltaworks", docs_url=None, redoc_url=None)
    app.add_exception_handler(DeltaworksError, _answer_error)
    app.middleware("http")(_add_headers)
    with as_file(files("deltaworks.serve")) as package:
        app.mount("/static", StaticFiles(directory=package / "static"))
    registry = CollectorRegistry() if name is None else _add_search(app, config, name).registry
    _add_apps(app, config, has_search=name is not None)
    add_actions(app, config)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    def metrics_text() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def run(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        PortInUseError: somebody else listens there; found out before anything starts.
        NoAppToServeError: see `build`.
    """
    _searched_app(config)
    # The worker is a process of its own, so it gets the configuration and makes its application from it.
    serve(
        partial(build, config),
        host=config.serve.host,
        port=config.serve.port,
        setting="serve.port in deltaworks.yaml",
        log_level=LogLevels.warning,
    )


def _searched_app(config: Config) -> str | None:
    if config.serve.app is not None:
        return config.serve.app
    found = [name for name in config.apps if _may_have_index(config, name)]
    if len(found) > 1:
        raise NoAppToServeError(
            f"cannot choose the app to serve out of {', '.join(found)!r}; set serve.app in deltaworks.yaml"
        )
    return found[0] if found else None


def _may_have_index(config: Config, name: str) -> bool:
    try:
        return any(isinstance(spec, SearchIndex) for spec in load_app(config, name).sinks)
    except DeltaworksError:
        # An app that cannot be imported here may still have an index here.
        return True


def _add_search(app: FastAPI, config: Config, name: str) -> Metrics:
    search = SearchReader(config.index_folder(name))
    source = config.app(name).source
    place = log_of(config, source)
    log = place.near_reader()

    def status() -> Status:
        return read_status(search, log)

    def captured() -> CaptureStatus:
        # Of the log alone: this process asks no database.
        return log_status(source, log, tables=config.source(source).table_names, service=place.holder())

    metrics = Metrics(name, status, captured)
    _add_page(app, search, metrics, name, status)
    _add_api(app, search, metrics, status)
    return metrics


def _add_apps(app: FastAPI, config: Config, *, has_search: bool) -> None:
    apps_now = Apps(config)

    def may_act(request: Request) -> bool:
        return stranger(request, config.serve.operators) is None

    @app.get("/apps", response_class=HTMLResponse)
    def apps(request: Request, ask: str = "") -> str:
        return render_apps(apps_now.read(), has_search=has_search, may_act=may_act(request), ask=ask)

    @app.get("/apps/list", response_class=HTMLResponse)
    def apps_list(request: Request) -> str:
        return render_list(apps_now.read(), may_act=may_act(request))

    @app.get("/api/apps")
    def api_apps() -> dict[str, Any]:
        return {"apps": [each.to_json() for each in apps_now.read()]}

    if not has_search:

        @app.get("/")
        def home() -> Response:
            return RedirectResponse("/apps")


def _add_page(app: FastAPI, search: SearchReader, metrics: Metrics, name: str, status: Callable[[], Status]) -> None:
    @app.get("/", response_class=HTMLResponse)
    def page(q: str = "") -> str:
        with metrics.search_s.time():
            found = find(search, q)
        return render_page(found, app=name, status=status())

    @app.get("/results", response_class=HTMLResponse)
    def results(q: str = "") -> str:
        with metrics.search_s.time():
            found = find(search, q)
        return render_results(found)


def _add_api(app: FastAPI, search: SearchReader, metrics: Metrics, status: Callable[[], Status]) -> None:
    @app.get("/api/search")
    def api_search(q: str = "", limit: Annotated[int, Query(ge=1, le=200)] = 20) -> dict[str, Any]:
        with metrics.search_s.time():
            result = search.search(q, limit)
        return {
            "query": q,
            "total": result.total,
            "is_close": result.is_close,
            "took_ms": round(result.took_s * 1e3, 3),
            "hits": [_hit_json(hit) | {"score": round(hit.score, 3)} for hit in result.hits],
        }

    @app.get("/api/documents")
    def api_documents(key: Annotated[list[str], Query(min_length=1, max_length=1_000)]) -> dict[str, Any]:
        return {"documents": [_hit_json(hit) for hit in search.documents(key)]}

    @app.get("/api/status")
    def api_status() -> dict[str, Any]:
        now = status()
        return {name: _plain(value) for name, value in asdict(now).items()} | {"text": status_text(now)}


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {
        "key": hit.key,
        "version": {"position": str(hit.version.position), "ordinal": hit.version.ordinal},
        "body": hit.body,
    }


def _plain(value: object) -> object:
    if isinstance(value, Lsn):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value


async def _answer_error(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=503)


async def _add_headers(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.headers.update(_HEADERS)
    return response
