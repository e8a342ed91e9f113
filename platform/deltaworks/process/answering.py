"""Answers what other processes ask of a running app, between two cycles of its runner."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import structlog

from deltaworks.errors import DeltaworksError
from deltaworks.process.fold import Key
from deltaworks.process.requests import Kind, Outcome, Request, Requests
from deltaworks.process.state import State

RELEASED_PER_CYCLE = 1_000
"""Entities of requests that one cycle takes beside fresh changes: half of what it can hold."""

logger = structlog.get_logger(__name__)


class Answering:
    """Sees to the requests of one app.

    `forget_answers` empties caches of what services said; `make_dirty` lets entities be processed again, inside a
    transaction of the state; `at_once` has the kinds that are done within one call, which is told the keys
    and when it was asked, and says how many entities it concerned.
    """

    def __init__(
        self,
        *,
        app: str,
        requests: Requests,
        state: State,
        forget_answers: Callable[[], None],
        make_dirty: Callable[[Sequence[Key]], int],
        at_once: Mapping[Kind, Callable[[Sequence[Key] | None, datetime], int]],
    ) -> None:
        self._app = app
        self._requests = requests
        self._state = state
        self._forget_answers = forget_answers
        self._make_dirty = make_dirty
        self._at_once = at_once

    def run(self) -> bool:
        """Begin what was asked, release some of what waits, end what is done; whether anything is under way."""
        requests = self._requests.open()
        for request in requests:
            try:
                self._see_to(request)
            except DeltaworksError as error:
                self._end(Outcome.of(request, error=str(error)))
        if self._state.asked.is_busy:
            # One transaction: what is released and not dirty would never be settled.
            with self._state.settling():
                self._make_dirty(self._state.asked.release(limit=RELEASED_PER_CYCLE))
                if not requests:
                    # The machine died after an outcome was written and before its request was forgotten here.
                    self._state.asked.forget_all()
        return bool(requests)

    def is_due(self) -> bool:
        """Whether `run` has anything to do."""
        return bool(self._requests.open()) or self._state.asked.is_busy

    def needs_rows(self) -> bool:
        """Whether it is asked for what only the rows of the entities can give."""
        return any(request.kind is Kind.REPROCESS for request in self._requests.open())

    def _see_to(self, request: Request) -> None:
        if request.kind is not Kind.REPROCESS:
            keys = self._state.asked.as_stored(request.keys)
            count = self._at_once[request.kind](keys, request.asked_at)
            missing = max(0, len(keys) - count) if keys is not None else 0
            self._end(Outcome.of(request, count=count, missing=missing))
            return
        with self._state.settling():
            if self._state.asked.begin(request):
                self._forget_answers()
        asking = self._state.asked.asking(request.id)
        if asking is not None and asking.left == 0:
            self._end(Outcome.of(request, count=asking.total, set_back=asking.set_back, missing=asking.missing))
            with self._state.settling():
                self._state.asked.forget(request.id)

    def _end(self, outcome: Outcome) -> None:
        self._requests.end(outcome)
        logger.info(
            "request ended",
            app=self._app,
            request=outcome.id,
            kind=outcome.kind.value,
            count=outcome.count,
            set_back=outcome.set_back,
            error=outcome.error,
        )
