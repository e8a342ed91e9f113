"""Dead letters of apps: list them, look into one, retry or drop them; whoever runs the app does it.

Reading needs no runner and disturbs none. A retry or a drop is a request (`operate.asking`): the running service takes
it in its next cycle; where none runs, this process runs the app to the end of its log.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.operate.asking import Answered, see_through
from deltaworks.process.fold import Key
from deltaworks.process.letters import Letter, LetterRows, letters_of, rows_of
from deltaworks.process.requests import Kind, Request
from deltaworks.process.runner import STATE_FILE


class NoDeadLetterError(TerminalError):
    """There is no dead letter of that key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadSummary:
    """The dead letters of an app: how many, since when, by step, and how many of them hold their key."""

    count: int
    holding: int
    oldest: datetime | None
    by_step: Mapping[str, int]


def dead_letters(config: Config, app: str, *, key: Key | None = None, limit: int | None = None) -> Sequence[Letter]:
    """Dead letters, the oldest failed change first; of one key if it is given.

    Raises:
        ConfigError: no such app in the configuration.
        NoDeadLetterError: there is none of that key.
    """
    config.app(app)
    found = letters_of(config.app_folder(app) / STATE_FILE, key=key, limit=limit)
    if key is not None and not found:
        raise NoDeadLetterError(
            f"app {app!r} has no dead letter of key {key!r}; `deltaworks dead ls {app}` lists those there are"
        )
    return found


def dead_rows(config: Config, app: str, key: Key) -> LetterRows:
    """The row data behind the letters of a key, for a person who asked to see it."""
    return rows_of(config.app_folder(app) / STATE_FILE, key)


def dead_summary(config: Config, app: str) -> DeadSummary:
    """The dead letters of an app in numbers; no row data."""
    letters = dead_letters(config, app)
    return DeadSummary(
        count=len(letters),
        holding=sum(letter.holds_key for letter in letters),
        oldest=min((letter.failed_at for letter in letters if letter.failed_at is not None), default=None),
        by_step=dict(Counter(letter.step for letter in letters).most_common()),
    )


def drop(config: Config, app: str, *, keys: Sequence[Key] | None = None) -> Answered:
    """Give up the dead letters there are now, those of some keys or all; return when it is done.

    What an entity's letter stood for does not leave until the entity's next change; a transition is never told.

    Raises:
        RequestRefusedError: the app could not do it; the message says why.
    """
    return see_through(config, app, Request.new(Kind.DROP, keys=keys))
