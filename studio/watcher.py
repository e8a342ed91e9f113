"""How long a commit takes to be seen: by who searches, and, as the least that can be measured so, in the database.

    commit ─► expect ─► ask every 0.1 s ─► the answer shows the new votes ─► one lag

A lag is from the moment the database confirmed the commit to the answer that shows it, so it includes
everything that somebody who looks would wait for, and up to one interval of asking.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

from studio import database
from studio.updates import Commit

ASK_EVERY_S = 0.1
KEYS_PER_QUESTION = 200

Look = Callable[[Sequence[int]], Mapping[int, int]]
"""The votes of films by their number, as a place shows them now; films that it does not show are left out."""

_VOTES = "select movie_id, coalesce(imdb_votes, 0) from rating where movie_id = any(%s)"


@contextmanager
def search_look(page: str) -> Iterator[Look]:
    """What the search page's API shows."""
    with httpx.Client(base_url=page, timeout=5.0) as client:

        def look(movie_ids: Sequence[int]) -> Mapping[int, int]:
            answer = client.get("/api/documents", params=[("key", str(movie_id)) for movie_id in movie_ids])
            bodies = [document["body"] for document in answer.raise_for_status().json()["documents"]]
            return {int(body["movie_id"]): (body.get("rating") or {}).get("votes") or 0 for body in bodies}

        yield look


@contextmanager
def database_look(dsn: str) -> Iterator[Look]:
    """What the database shows: the limit of every lag that is measured by asking."""
    with database.connect(dsn) as connection:
        yield lambda movie_ids: dict(connection.execute(_VOTES, [list(movie_ids)]).fetchall())


class VotesWatcher:
    """Asks one place for films that were just rated, in a thread of its own, until it shows the new votes."""

    def __init__(self, look: Look, *, name: str) -> None:
        self.lags_s: list[float] = []
        self._look = look
        self._waiting: dict[int, list[tuple[int, float]]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name)

    def __enter__(self) -> "VotesWatcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def unseen(self) -> int:
        """Expected votes that no answer has shown."""
        with self._lock:
            return sum(len(expected) for expected in self._waiting.values())

    def expect(self, commit: Commit) -> None:
        """Remember what the commit makes the place show; films it deletes are no longer expected."""
        now = time.monotonic()
        with self._lock:
            for movie_id in commit.deleted:
                self._waiting.pop(movie_id, None)
            for movie_id, votes in commit.votes.items():
                self._waiting.setdefault(movie_id, []).append((votes, now))

    def forget(self, movie_ids: set[int]) -> None:
        """Stop expecting films that the place does not list."""
        with self._lock:
            for movie_id in movie_ids & self._waiting.keys():
                del self._waiting[movie_id]

    def wait(self, *, timeout_s: float) -> None:
        """Return when everything expected was seen, or time is up."""
        deadline = time.monotonic() + timeout_s
        while self.unseen and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(ASK_EVERY_S)

    def _watch(self) -> None:
        while not self._stop.wait(ASK_EVERY_S):
            with self._lock:
                keys = list(self._waiting)
            for first in range(0, len(keys), KEYS_PER_QUESTION):
                shown = self._look(keys[first : first + KEYS_PER_QUESTION])
                self._see(shown, time.monotonic())

    def _see(self, shown: Mapping[int, int], now: float) -> None:
        with self._lock:
            for movie_id, votes in shown.items():
                expected = self._waiting.get(movie_id, [])
                self.lags_s += [now - at for wanted, at in expected if wanted <= votes]
                left = [(wanted, at) for wanted, at in expected if wanted > votes]
                if left:
                    self._waiting[movie_id] = left
                else:
                    self._waiting.pop(movie_id, None)
