"""Requests to an app: how another process asks its runner for something, and learns how it ended.

    home/process/<app>/requests/
        <id>.request.json   what is asked: written by who asks, durable before the asking returns
        ended/<id>.json     the outcome, written once by the runner

Every file is written beside its place and renamed, so a reader meets all of it or nothing. A request that is
asked while nobody runs the app waits for the next runner. One that was taken when the runner died is taken
again: what a request does has to be safe to do twice.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

import structlog

from deltaworks.process.fold import Key

ENDED_KEPT = 200
"""Outcomes kept for people to look at; older ones are removed."""

_REQUEST, _ENDED = ".request.json", "ended"

logger = structlog.get_logger(__name__)


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
            id=f"{asked_at:%Y%m%d-%H%M%S}-{asked_at.microsecond // 1000:03}{uuid.uuid4().hex[:4]}",
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


class Requests:
    """The requests of one app, in a folder that need not exist yet. Any process may ask, the runner answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Request] = {}
        self._looked: int | None = None

    @classmethod
    def of(cls, app_folder: Path) -> Self:
        """Those of the app whose state is in that folder."""
        return cls(app_folder / "requests")

    def ask(self, request: Request) -> None:
        """Place a request; durable when this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{request.id}{_REQUEST}", request.to_json())

    def open(self) -> Sequence[Request]:
        """Requests that have not ended, oldest first. Cheap while nobody asks: one `stat` of the folder."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return ()
        if changed != self._looked or self._known:
            found = {path.name: path for path in sorted(self._folder.glob(f"*{_REQUEST}"))}
            self._known = {
                name: request
                for name, path in found.items()
                if (request := self._known.get(name) or self._read(path)) is not None
            }
            # A file may come within the clock's tick in which we looked; such a fresh folder is looked at again.
            self._looked = changed if datetime.now(UTC).timestamp() * 1e9 - changed > 1e9 else None
        # A request whose outcome was written just before a crash is here once more; it is over.
        return [request for request in self._known.values() if not self._ended(request.id).exists()]

    def end(self, outcome: Outcome) -> None:
        """Write how a request ended and remove it; a no-op for one that has ended."""
        path = self._ended(outcome.id)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, outcome.to_json())
        # Only now: dying before this line leaves a request that its outcome marks as ended.
        (self._folder / f"{outcome.id}{_REQUEST}").unlink(missing_ok=True)
        self._known.pop(f"{outcome.id}{_REQUEST}", None)
        for old in sorted(path.parent.glob("*.json"))[:-ENDED_KEPT]:
            old.unlink(missing_ok=True)

    def outcome(self, request_id: str) -> Outcome | None:
        """How a request ended; `None` while it has not."""
        try:
            return Outcome.from_json(json.loads(self._ended(request_id).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def outcomes(self) -> Iterator[Outcome]:
        """Those that ended, newest first."""
        for path in sorted((self._folder / _ENDED).glob("*.json"), reverse=True):
            if (outcome := self.outcome(path.stem)) is not None:
                yield outcome

    def _read(self, path: Path) -> Request | None:
        try:
            return Request.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            # Somebody else's file, or one written by hand: an app must not stop for it.
            logger.error("a request cannot be read and is put aside", file=str(path), error=repr(error))
            path.rename(path.with_suffix(".unreadable"))
            return None

    def _ended(self, request_id: str) -> Path:
        return self._folder / _ENDED / f"{request_id}.json"


def write_json(path: Path, values: Mapping[str, Any]) -> None:  # Any: JSON values
    """Put a JSON file in its place, all of it or nothing; durable when this returns."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(values, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    # Rename is atomic only inside one directory, so the draft is written next to its place.
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
