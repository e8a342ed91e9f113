"""Requests to an app: what another process may ask its runner for, and how that ended.

They are files in `home/process/<app>/requests/`; one that is asked while nobody runs the app waits for the next runner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

from deltaworks.process.fold import Key
from deltaworks.request_folder import RequestFolder, new_id


class Kind(Enum):
    """What may be asked of a runner."""

    REPROCESS = "reprocess"
    """Make documents anew though nothing changed; ends when each of them is written, held or dead."""
    RETRY = "retry"
    """Let dead letters be processed again, from their newest state."""
    DROP = "drop"
    """Give up the dead letters that there were when it was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One of `count` even parts of an app's keys, by a hash of the key: `index` counts from 0."""

    index: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Something that somebody asked of an app: of some keys, of a slice of all keys, or, without both, of all."""

    id: str
    kind: Kind
    keys: tuple[Key, ...] | None = None
    slice: Slice | None = None
    asked_at: datetime

    @property
    def is_of_all(self) -> bool:
        """Whether every document is made anew for it: asking once more would only do it twice."""
        return self.kind is Kind.REPROCESS and self.keys is None and self.slice is None

    @classmethod
    def new(cls, kind: Kind, *, keys: Sequence[Key] | None = None, slice: Slice | None = None) -> Self:  # noqa: A002
        """A request with an id of its own; ids sort by time."""
        asked_at = datetime.now(UTC)
        return cls(
            id=new_id(asked_at),
            kind=kind,
            keys=None if keys is None else tuple(dict.fromkeys(keys)),
            slice=slice,
            asked_at=asked_at,
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(
            id=stored["id"],
            kind=Kind(stored["kind"]),
            keys=None if stored["keys"] is None else tuple(stored["keys"]),
            slice=None if stored["slice"] is None else Slice(**stored["slice"]),
            asked_at=datetime.fromisoformat(stored["asked_at"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The request as JSON values."""
        return asdict(self) | {"kind": self.kind.value, "asked_at": self.asked_at.isoformat()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended. `count` entities were concerned, `set_back` of them are held or dead now.

    `missing` counts asked keys that the app has never seen. With an `error` nothing was done.
    """

    id: str
    kind: Kind
    count: int = 0
    set_back: int = 0
    missing: int = 0
    error: str | None = None
    asked_at: datetime
    ended_at: datetime

    @classmethod
    def of(cls, request: Request, **facts: Any) -> Self:  # Any: the counts above, or the error
        """The outcome of a request that ends now."""
        return cls(id=request.id, kind=request.kind, asked_at=request.asked_at, ended_at=datetime.now(UTC), **facts)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        times = {name: datetime.fromisoformat(stored[name]) for name in ("asked_at", "ended_at")}
        return cls(**(dict(stored) | times | {"kind": Kind(stored["kind"])}))

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The outcome as JSON values."""
        times = {"asked_at": self.asked_at.isoformat(), "ended_at": self.ended_at.isoformat()}
        return asdict(self) | times | {"kind": self.kind.value}


class Requests(RequestFolder[Request, Outcome]):
    """The requests of one app; its runner answers them. See `RequestFolder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, request_of=Request.from_json, outcome_of=Outcome.from_json)

    @classmethod
    def of(cls, app_folder: Path) -> Self:
        """Those of the app whose state is in that folder."""
        return cls(app_folder / "requests")
