"""Process entities again though nothing changed: for a step or a service that gives other answers now.

The request goes to whoever runs the app: its service when one runs, else the caller itself. Both take the rows
that the log brought into the app's state and the same steps, so what comes out is what living through the changes
would have made.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.config import Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.process.asked import read_asking
from deltaworks.process.fold import Key
from deltaworks.process.pausing import Pause
from deltaworks.process.place import AppHeldError
from deltaworks.process.registry import load_app
from deltaworks.process.requests import Kind, Outcome, Request, Requests, Slice
from deltaworks.process.runner import STATE_FILE, Runner

LOOK_EVERY_S = 0.1
"""How often a caller looks how far the service is with its request."""

OnAskedProgress = Callable[[int, int], None]
"""Called with the entities done and those there are."""


class RequestRefusedError(TerminalError):
    """The runner of an app could not do what was asked of it."""


class NotAnsweredError(RetryableError):
    """A request waits for the next runner of the app."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request that was seen through. `elsewhere` says of a shared app what is left for others to do."""

    app: str
    outcome: Outcome
    answered_by: str
    elsewhere: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for people."""
        outcome = self.outcome
        facts = f"{outcome.set_back:,} of them wait or are dead letters, " if outcome.set_back else ""
        facts += f"{outcome.missing:,} keys are unknown, " if outcome.missing else ""
        done = f"{self.app}: {outcome.kind.value} of {outcome.count:,} entities, {facts}by {self.answered_by}"
        return "; ".join((done, *self.elsewhere))


def reprocess(
    config: Config,
    app: str,
    *,
    keys: Sequence[Key] | None = None,
    part: Slice | None = None,
    on_progress: OnAskedProgress | None = None,
) -> Answered:
    """Make the documents of some keys, of a part of all keys, or of all of them anew; return when they are written.

    Stopping to wait, by an exception such as a keyboard interrupt, does not end what the service is at.

    Raises:
        RequestRefusedError: the app could not do it; the message says why.
        AppPausedError: a person paused the app; it does what was asked once it is resumed.
        DeltaworksError: whatever the app's run raises.
    """
    if (shares := config.app(app).shares) is not None:
        raise RequestRefusedError(
            f"cannot reprocess entities of app {app!r}: no one process has all of its {shares} shares; stop every "
            "member, change `shares` as the guide to Kafka says, and they make every document anew"
        )
    return see_through(config, app, Request.new(Kind.REPROCESS, keys=keys, slice=part), on_progress=on_progress)


def parse_asked(texts: Sequence[str]) -> Sequence[Key]:
    """Keys out of the command line: `5,77`, or `@FILE` with one on each line.

    >>> parse_asked(["5,77", "tt1"])
    ['5', '77', 'tt1']

    Raises:
        RequestRefusedError: a file cannot be read.
    """
    keys: list[Key] = []
    for text in texts:
        if not text.startswith("@"):
            keys += filter(None, map(str.strip, text.split(",")))
            continue
        try:
            keys += filter(None, map(str.strip, Path(text[1:]).read_text(encoding="utf-8").splitlines()))
        except OSError as error:
            raise RequestRefusedError(f"cannot read keys from {text[1:]!r}: {error.strerror}") from error
    return keys


def see_through(config: Config, app: str, request: Request, *, on_progress: OnAskedProgress | None = None) -> Answered:
    """Place a request and return when it has ended, done by the service or, where none runs, here.

    Raises:
        RequestRefusedError: it ended with an error.
        NotAnsweredError: it was left to the next runner, because this one had to stop.
    """
    requests = Requests.of(config.app_folder(app))
    loaded = load_app(config, app)
    requests.ask(request)
    while (outcome := requests.outcome(request.id)) is None:
        try:
            runner = Runner.open(loaded, config=config, name=app)
        except AppHeldError:
            _watch(config, app, requests, request, on_progress)
            continue
        with runner:
            runner.drain(on_progress=on_progress)
        outcome = requests.outcome(request.id)
        if outcome is None:
            raise NotAnsweredError(f"{request.kind.value} {request.id} of app {app!r} is left to its next runner")
        return judged(Answered(app=app, outcome=outcome, answered_by="this run"))
    return judged(Answered(app=app, outcome=outcome, answered_by="the process service"))


def _watch(config: Config, app: str, requests: Requests, request: Request, on_progress: OnAskedProgress | None) -> None:
    """Follow a request that another runner has, for a second; then it is time to see whether that still runs."""
    until = time.monotonic() + 1.0
    while requests.outcome(request.id) is None and time.monotonic() < until:
        # The request stays: who resumes the app has it done.
        Pause(config.app_folder(app)).check(app)
        asking = read_asking(config.app_folder(app) / STATE_FILE, request.id)
        if asking is not None and on_progress is not None:
            on_progress(asking.total - asking.left, asking.total)
        time.sleep(LOOK_EVERY_S)


def judged(answered: Answered) -> Answered:
    """The same.

    Raises:
        RequestRefusedError: it ended with an error.
    """
    outcome = answered.outcome
    if outcome.error is not None:
        raise RequestRefusedError(f"cannot {outcome.kind.value} app {answered.app!r}: {outcome.error}")
    return answered
