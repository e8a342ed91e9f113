"""Where an entity stands, and what waits: handed from the state to the pipeline, and back with what failed."""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple

from deltaworks.position import Version
from deltaworks.process.fold import Key


class Standing(IntEnum):
    """Where an entity stands; kept in the state, so a restart goes on from it.

    | from          | to    | when                                                                          |
    |---------------|-------|-------------------------------------------------------------------------------|
    | CLEAN, DIRTY  | DIRTY | a change touched it                                                           |
    | DIRTY, HELD   | CLEAN | its document is durable in every sink                                         |
    | DIRTY, HELD   | HELD  | a step failed in a way that may pass: again at `next_try`                     |
    | DIRTY, HELD   | DEAD  | a step failed for good                                                        |
    | DEAD          | DIRTY | a person retries it, its row is gone, or, if the letter holds no key, a change |
    | DEAD          | CLEAN | a person drops the letter                                                     |
    """

    CLEAN = 0
    DIRTY = 1
    HELD = 2
    DEAD = 3


class Waiting(NamedTuple):
    """An entity to process: its newest change, how often it has failed, and whether that change is a dump's read."""

    key: Key
    version: Version
    committed_at: datetime
    attempts: int
    is_read: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Setback:
    """A key that could not be processed: to be held until `next_try` (seconds since 1970) or, without it, dead.

    `place` is the step's file and line. `holds_key`: whether later changes wait behind a dead one; as the app says when
    left out.
    """

    key: Key
    step: str
    error: str
    attempts: int
    next_try: float | None
    place: str | None = None
    holds_key: bool | None = None
