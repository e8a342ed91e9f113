"""What is asked of the members of a shared app: each of those that run on this machine does its own part.

Where none runs here, this process becomes one until nobody who has ended holds a letter any more: who takes a share
tries again what was dead in it.
"""

import time
from collections.abc import Sequence

from deltaworks.config import Config
from deltaworks.log.holder import holder_of
from deltaworks.operate.asking import (
    LOOK_EVERY_S,
    Answered,
    NotAnsweredError,
    RequestRefusedError,
    judged,
)
from deltaworks.process.letters import Letter
from deltaworks.process.pausing import Pause
from deltaworks.process.registry import load_app
from deltaworks.process.requests import Kind, Outcome, Request, Requests
from deltaworks.process.runner import Runner
from deltaworks.process.shared.member_letters import address, letters_over
from deltaworks.process.shared.members import Member, members_or_here
from deltaworks.process.shared.shares import share_of
from deltaworks.process.sink import key_text

TAKEN_WITHIN_S = 60.0
"""How long this process waits for the shares of members that have ended."""


def see_through_members(config: Config, app: str, request: Request) -> Answered:
    """Have a retry or a drop done by every member here that it concerns, and return when all have.

    Raises:
        RequestRefusedError: a letter that is to be dropped is held by nobody who could, or a member could not do it.
        NotAnsweredError: nobody took the shares of a member that has ended.
        AppPausedError: a person paused the app; its members do what was asked once it is resumed.
    """
    shares = config.app(app).shares or 0
    to_whom = address(members_or_here(config, app), request, shares=shares)
    if request.kind is Kind.DROP and to_whom.ended:
        raise RequestRefusedError(_not_droppable(app, to_whom.ended))
    if to_whom.running:
        outcomes = _ask(config, app, request, to_whom.running)
        by = f"{len(to_whom.running):,} members here"
        if to_whom.ended:
            by += f" and whoever takes the shares of {_holders(to_whom.ended)}"
    elif request.kind is Kind.RETRY and (request.keys is None or to_whom.ended):
        outcomes, by = [_run_here(config, app, request, to_whom.ended)], "this run"
    else:
        outcomes, by = [], "nobody, because no member here has any"
    outcome = Outcome.of(
        request,
        count=sum(each.count for each in outcomes) + (len(to_whom.ended) if to_whom.running else 0),
        set_back=sum(each.set_back for each in outcomes),
        missing=len(to_whom.missing),
        error="; ".join(dict.fromkeys(each.error for each in outcomes if each.error is not None)) or None,
    )
    elsewhere = tuple(each.text for each in to_whom.elsewhere)
    return judged(Answered(app=app, outcome=outcome, answered_by=by, elsewhere=elsewhere))


def _ask(config: Config, app: str, request: Request, members: Sequence[Member]) -> list[Outcome]:
    """Place the request with each of these, and wait until each has answered or ended."""
    folders = [member.folder for member in members if member.folder is not None]
    for folder in folders:
        Requests.of(folder).ask(request)
    answered: list[Outcome] = []
    for folder in folders:
        requests = Requests.of(folder)
        while (outcome := requests.outcome(request.id)) is None:
            # The requests stay: who resumes the app has them done.
            Pause(config.app_folder(app)).check(app)
            if holder_of(folder / "lock") is None:
                # Whoever takes its shares tries all again; a drop that it may have begun is over with it.
                error = "a member ended before it could; do it again" if request.kind is Kind.DROP else None
                requests.end(Outcome.of(request, error=error))
            else:
                time.sleep(LOOK_EVERY_S)
        answered.append(outcome)
    return answered


def _run_here(config: Config, app: str, request: Request, letters: Sequence[Letter]) -> Outcome:
    """Be a member until somebody is at every share that one of these letters is in."""
    shares = config.app(app).shares or 0
    wanted = {key_text(letter.key) for letter in letters}
    untaken = {share_of(letter.key, shares=shares) for letter in letters}
    deadline = time.monotonic() + TAKEN_WITHIN_S
    with Runner.open(load_app(config, app), config=config, name=app) as runner:
        if not letters:
            runner.drain()
        while untaken:
            # Who is at a share has tried what was dead in it before a drain comes back.
            runner.drain(patience_s=LOOK_EVERY_S)
            members = members_or_here(config, app)
            untaken -= {share for member in members if not member.is_gone for share in member.own}
            if untaken and time.monotonic() > deadline:
                raise NotAnsweredError(
                    f"shares {sorted(untaken)} of app {app!r} are not taken from {_holders(letters)} yet, so dead "
                    f"letters in them were not tried again; look at `deltaworks status`, then do this again"
                )
        waiting = [*letters_over(members_or_here(config, app)), *runner.held(limit=-1)]
    failed = wanted & {key_text(letter.key) for letter in waiting}
    return Outcome.of(request, count=len(wanted), set_back=len(failed))


def _not_droppable(app: str, ended: Sequence[Letter]) -> str:
    keys = sorted({key_text(letter.key) for letter in ended})
    some = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
    return (
        f"cannot drop dead letters of app {app!r}: {_holders(ended)} held those of {some} and has ended, and whoever "
        f"takes its shares tries them again; nothing was dropped. See that a member runs (`deltaworks process {app}`), "
        f"and drop what is dead again then"
    )


def _holders(letters: Sequence[Letter]) -> str:
    return ", ".join(sorted({letter.member or "" for letter in letters}))
