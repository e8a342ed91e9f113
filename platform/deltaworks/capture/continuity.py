"""What keeps a source's stream unbroken: one reader at a time, a slot in good health, and gaps that are named."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, Self

from deltaworks.errors import RetryableError, TerminalError
from deltaworks.position import Lsn


class LeaseLostError(TerminalError):
    """Another reader has taken this one's place; whoever lost it stands by again."""


class LeaseHeldError(RetryableError):
    """Another reader has the source and is alive; stand by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHealth:
    """How a source's bookmark is.

    `kept_bytes` of log are kept for it; `safe_bytes` more may come before the server gives it up, `None` where
    no limit is set. `state` is the server's own word. `is_failover` is `None` where the server has no such thing.
    """

    confirmed: Lsn | None
    current: Lsn
    kept_bytes: int
    safe_bytes: int | None
    state: str
    is_lost: bool
    is_failover: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Changes that are in no stream: those committed after `since` and before `until`.

    It stays in the log's progress until all tables were dumped again.
    """

    since: Lsn
    until: Lsn
    reason: str
    noticed_at: datetime

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            since=Lsn(stored["since"]),
            until=Lsn(stored["until"]),
            reason=stored["reason"],
            noticed_at=datetime.fromisoformat(stored["noticed_at"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The gap as JSON values, as it is stored in a group's progress."""
        return {
            "since": self.since.value,
            "until": self.until.value,
            "reason": self.reason,
            "noticed_at": self.noticed_at.isoformat(),
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"changes from {self.since} to {self.until} were missed: {self.reason}"


class SourceLease(Protocol):
    """The right to be the one reader of a source, over all machines; held until `close` or the process ends.

    It is limited in time: a holder that does not answer for a while loses it to whoever asks for it. The loser
    is cut off from the source first, so it can neither read nor confirm any more.
    """

    def is_held(self) -> bool:
        """Whether it is still ours, as far as is known without asking."""

    def check(self) -> None:
        """Make sure that it is ours, taking it again where the connection broke and nobody else took it.

        Raises:
            LeaseLostError: another reader has it.
            SourceUnreachableError: the server does not answer.
        """

    def close(self) -> None:
        """Let another reader have it."""
