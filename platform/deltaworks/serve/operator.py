"""Who may act on apps, and what they may do: the only routes of the server that change anything.

A browser sends a form of another site with this user's rights, so a request counts only if the browser says that
our own page made it. A name that another site's owner points at this machine is refused by its host.
"""

import ipaddress
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from deltaworks.config import Config
from deltaworks.process.pausing import Pause
from deltaworks.process.requests import Kind, Requests
from deltaworks.process.requests import Request as Asked
from deltaworks.process.shared.member_letters import address
from deltaworks.process.shared.members import members_or_here

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def add_actions(app: FastAPI, config: Config) -> None:
    """Add `POST /apps/{name}/{action}`: pause, resume, retry (with `key`, of one dead letter alone), reprocess, and
    drop, which takes a `key` always: all at once are dropped on the command line alone.
    """

    @app.post("/apps/{name}/{action}")
    def act(request: Request, name: str, action: str, key: str | None = None) -> Response:
        refusal = refusal_of(request, config.serve.operators)
        if refusal is not None:
            raise HTTPException(403, refusal)
        if name not in config.apps or action not in _ACTIONS:
            known = f"apps {', '.join(config.apps) or 'none'}; actions {', '.join(_ACTIONS)}"
            raise HTTPException(404, f"no {action!r} of app {name!r}; known: {known}")
        fault = _ACTIONS[action](config, name, key)
        if fault is not None:
            raise HTTPException(409, fault)
        # See Other: the browser shows the page again, and reloading it does not act again.
        return RedirectResponse(f"/apps#app-{name}", status_code=303)


def refusal_of(request: Request, operators: str) -> str | None:
    """Why this request may not act; `None` when it may."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc != request.url.netloc):
        return "only this server's own page may act"
    return stranger(request, operators)


def stranger(request: Request, operators: str) -> str | None:
    """Why whoever asks is no operator; `None` when they are. A page shows them buttons."""
    if operators == "nobody":
        return "nobody may act here; set serve.operators"
    if operators == "this machine" and (request.url.hostname not in _LOCAL_NAMES or not _is_local(request)):
        return "only a browser on this machine may act; set serve.operators to allow others"
    return None


def _is_local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _pause(config: Config, name: str, _key: str | None) -> None:
    Pause(config.app_folder(name)).pause()


def _resume(config: Config, name: str, _key: str | None) -> None:
    Pause(config.app_folder(name)).resume()


def _retry(config: Config, name: str, key: str | None) -> str | None:
    return _place(config, name, Asked.new(Kind.RETRY, keys=None if key is None else [key]))


def _drop(config: Config, name: str, key: str | None) -> str | None:
    if key is None:
        return f"name the key to drop; `deltaworks dead drop {name} --all` drops every dead letter"
    return _place(config, name, Asked.new(Kind.DROP, keys=[key]))


def _place(config: Config, name: str, request: Asked) -> str | None:
    """Place a request with whoever runs the app: with the members here that it concerns, where several share it."""
    shares = config.app(name).shares
    if shares is None:
        Requests.of(config.app_folder(name)).ask(request)
        return None
    to_whom = address(members_or_here(config, name), request, shares=shares)
    if request.keys is not None and to_whom.ended:
        return "the member that held it has ended: whoever takes its shares tries it again"
    if request.keys is not None and to_whom.missing:
        return "; ".join(["no member here has such a dead letter", *(each.text for each in to_whom.elsewhere)])
    if not to_whom.running:
        return f"no member runs here; start one with `deltaworks process {name}`: it tries all again that it takes"
    for member in to_whom.running:
        if member.folder is not None:
            Requests.of(member.folder).ask(request)
    return None


def _reprocess(config: Config, name: str, _key: str | None) -> str | None:
    if config.app(name).shares is not None:
        return f"app {name!r} is shared, and none of its processes has all entities; see the guide to Kafka"
    requests = Requests.of(config.app_folder(name))
    if not any(asked.is_of_all for asked in requests.open()):
        requests.ask(Asked.new(Kind.REPROCESS))
    return None


_ACTIONS: Mapping[str, Callable[[Config, str, str | None], str | None]] = {
    "pause": _pause,
    "resume": _resume,
    "retry": _retry,
    "drop": _drop,
    "reprocess": _reprocess,
}
"""Each gives why it was not done, if it was not."""
