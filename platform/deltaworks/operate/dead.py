"""Dead letters of apps: list them, look into one, retry or drop them; whoever runs the app does it.

Reading needs no runner and disturbs none. A retry or a drop is a request (`operate.asking`): the running service takes
it in its next cycle; where none runs, this process runs the app to the end of its log. The letters of a shared app are
with its members, each of which sees to its own; see `operate.members`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.operate.asking import Answered, see_through
from deltaworks.operate.members import see_through_members
from deltaworks.process.fold import Key
from deltaworks.process.letters import Letter, LetterRows, letters_of, rows_of
from deltaworks.process.requests import Kind, Request
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.shared.member_letters import DeadElsewhere, dead_elsewhere, letters_over
from deltaworks.process.shared.members import members_or_here


class NoDeadLetterError(TerminalError):
    """There is no dead letter of that key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadSummary:
    """The dead letters of an app: how many, since when, by step, and how many of them hold their key.

    `elsewhere` are those of a shared app's members on other machines, by member; `count` has them, the rest has not.
    """

    count: int
    holding: int
    oldest: datetime | None
    by_step: Mapping[str, int]
    elsewhere: Mapping[str, int]


def dead_letters(config: Config, app: str, *, key: Key | None = None, limit: int | None = None) -> Sequence[Letter]:
    """Dead letters, the oldest failed change first; of one key if it is given.

    Of a shared app they are those of every member whose state is on this machine, also of one that has ended, as long
    as nobody is at its shares. Where the group does not answer, a letter may be one that was seen to since.

    Raises:
        ConfigError: no such app in the configuration.
        NoDeadLetterError: there is none of that key; where it may be on another machine, the message has which.
    """
    if (shares := config.app(app).shares) is None:
        found, elsewhere = letters_of(config.app_folder(app) / STATE_FILE, key=key, limit=limit), ""
    else:
        members = members_or_here(config, app)
        found = letters_over(members, key=key, limit=limit)
        others = dead_elsewhere(members, shares=shares, keys=None if key is None else [key])
        elsewhere = "".join(f"; {each.text}" for each in others)
    if key is not None and not found:
        raise NoDeadLetterError(
            f"app {app!r} has no dead letter of key {key!r}{' on this machine' if elsewhere else ''}; "
            f"`deltaworks dead ls {app}` lists those there are{elsewhere}"
        )
    return found


def letters_elsewhere(config: Config, app: str) -> Sequence[DeadElsewhere]:
    """Members of a shared app that have dead letters of which this machine knows the number alone."""
    shares = config.app(app).shares
    return () if shares is None else dead_elsewhere(members_or_here(config, app), shares=shares)


def dead_rows(config: Config, app: str, key: Key) -> LetterRows:
    """The row data behind the letters of a key, for a person who asked to see it: of who holds the first of them."""
    if config.app(app).shares is None:
        return rows_of(config.app_folder(app) / STATE_FILE, key)
    members = members_or_here(config, app)
    holders = {letter.member for letter in letters_over(members, key=key, limit=1)}
    folders = [member.folder for member in members if member.name in holders and member.folder is not None]
    return rows_of(folders[0] / STATE_FILE, key) if folders else LetterRows(rows={}, turns=[])


def dead_summary(config: Config, app: str) -> DeadSummary:
    """The dead letters of an app in numbers; no row data."""
    letters = dead_letters(config, app)
    elsewhere = {each.member: each.count for each in letters_elsewhere(config, app)}
    return DeadSummary(
        count=len(letters) + sum(elsewhere.values()),
        holding=sum(letter.holds_key for letter in letters),
        oldest=min((letter.failed_at for letter in letters if letter.failed_at is not None), default=None),
        by_step=dict(Counter(letter.step for letter in letters).most_common()),
        elsewhere=elsewhere,
    )


def retry(config: Config, app: str, *, keys: Sequence[Key] | None = None) -> Answered:
    """Let dead letters be processed again, those of some keys or all; return when they are due.

    Raises:
        RequestRefusedError: the app could not do it; the message says why.
    """
    return _asked(config, app, Request.new(Kind.RETRY, keys=keys))


def drop(config: Config, app: str, *, keys: Sequence[Key] | None = None) -> Answered:
    """Give up the dead letters there are now, those of some keys or all; return when it is done.

    What an entity's letter stood for does not leave until the entity's next change; a transition is never told.

    Raises:
        RequestRefusedError: the app could not do it; the message says why.
    """
    return _asked(config, app, Request.new(Kind.DROP, keys=keys))


def _asked(config: Config, app: str, request: Request) -> Answered:
    see = see_through if config.app(app).shares is None else see_through_members
    return see(config, app, request)
