"""The contract of a group whose members share the work on one log: who has which share, and how far each share is.

    member ──poll──► shares given, shares to leave, shares lost
           ──confirm──► how far its shares are: durable, and proof that it is a member still

A share is a number below the group's size. At most one member has it, but for one that was cut off and has not noticed:
what that one does is told to nobody any more, because its `confirm` is refused.
"""

import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deltaworks.errors import RetryableError, TerminalError


class MembershipLostError(RetryableError):
    """The group does not answer this member, or has gone on without it; its shares come back by `poll`, if at all."""


class SharesError(TerminalError):
    """The work on this log cannot be shared so."""


@dataclass(slots=True, kw_only=True)
class Moved:
    """What became of this member's shares since the last `poll`.

    `given` maps a share to the last group of the log that everyone before was done with; -1 where nobody was before.
    `lost` shares are others' already.
    """

    given: Mapping[int, int] = field(default_factory=dict)
    lost: Collection[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareStanding:
    """A share as the group knows it: up to which group of the log it is done, -1 where nobody was there yet.

    `note` is what was said with it, empty where nothing was. `holder` has it now: `None` where nobody does, empty where
    who does gives the group no name; it may be another than who said this.
    """

    done: int
    note: str = ""
    holder: str | None = ""


class Leaving(Protocol):
    """What a member does about shares that it is asked for."""

    def __call__(self, shares: Collection[int], /) -> Mapping[int, int]:
        """Stop the work on them and say how far each is; nobody has them before this returns."""


class Membership(Protocol):
    """One member of a group. Serves one thread."""

    lease_s: float
    """After a `confirm`, nobody else is given this member's shares for so long, but with its `Leaving`."""

    def poll(self, leaving: Leaving) -> Moved:
        """Take part in the group: call it often, and only where no work on a share is under way.

        Raises:
            RetryableError: the group does not answer; what was given meanwhile comes with a later call.
        """

    def confirm(self, done: Mapping[int, int], *, note: str = "") -> None:
        """Say up to which group of the log each of these shares is done; durable when this returns.

        The group keeps `note`, of a thousand bytes at most, beside each of them; so it does beside those that are left.

        Raises:
            MembershipLostError: it is not known whether this member still has its shares.
        """

    def progress(self) -> Mapping[int, int]:
        """How far every share of the group is, whoever has it.

        Raises:
            RetryableError: the group does not answer.
        """

    def close(self) -> None:
        """Leave the group at once. A second call does nothing."""


def member_name() -> str:
    """What others call this process: its machine and its id."""
    return f"{socket.gethostname()}:{os.getpid()}"
