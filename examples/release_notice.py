"""An event-driven workflow: when a film is released, a partner is told, after the lake has its new state.

Each notice is signed, and has the same idempotency key however often it is sent. A partner who does not answer is
told later; later notices of the same film wait, other films go on.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypedDict

import httpx

from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Transition
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.sinks.webhook import IDEMPOTENCY_HEADER, signed


class Movie(TypedDict):
    movie_id: int
    title: str
    status: str


studio = Source("studio")
films = App("release_notice", key="movie_id", sources=[studio.table("movie", schema=Movie)])
films.sink(LakeTable("announced", schema=Movie))


@films.client
async def partner(settings: Mapping[str, Any]) -> AsyncIterator["Partner"]:
    """The partner's address, and the secret it shares with us."""
    async with httpx.AsyncClient() as client:
        yield Partner(client, settings["partner_url"], settings["partner_secret"])


@films.on_change("status", to="released", retry=Backoff(first_s=1.0, max_s=300.0))
async def announce(change: Transition[Movie], partner: "Partner") -> None:
    """Tell the partner of a release."""
    await partner.tell(change.id, {"film": change.key, "title": change.after["title"], "was": change.before})


class Partner:
    """Sends signed notices."""

    def __init__(self, client: httpx.AsyncClient, url: str, secret: str) -> None:
        self._client, self._url, self._secret = client, url, secret

    async def tell(self, notice_id: str, notice: Mapping[str, Any]) -> None:
        """Send a notice; raises where it was not taken."""
        body = json.dumps(notice).encode()
        headers = {**signed(body, secret=self._secret, timestamp=int(time.time())), IDEMPOTENCY_HEADER: notice_id}
        (await self._client.post(self._url, content=body, headers=headers)).raise_for_status()
