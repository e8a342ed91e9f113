"""Requests as files: how a process asks the one that holds something, and learns how it ended.

    <folder>/
        <id>.request.json   what is asked: written by who asks, durable before the asking returns
        ended/<id>.json     the outcome, written once by who answers

Every file is written beside its place and renamed, so a reader meets all of it or nothing. What is asked while nobody
answers waits. A request that was taken when its taker died is taken again: what it does has to be safe to do twice.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import structlog

ENDED_KEPT = 200
"""Outcomes kept for people to look at; older ones are removed."""

_REQUEST, _ENDED = ".request.json", "ended"
_CLOCK_TICK_NS = 1_000_000_000

logger = structlog.get_logger(__name__)


class Kept(Protocol):
    """A request, or how one ended: a frozen value with the id of the request."""

    @property
    def id(self) -> str:
        """Unlike that of any other; ids sort by time."""

    def to_json(self) -> dict[str, Any]:
        """The value as JSON values, which the folder's readers turn into it again."""


R = TypeVar("R", bound=Kept)
E = TypeVar("E", bound=Kept)


class RequestFolder(Generic[R, E]):
    """Requests `R` and outcomes `E` in a folder that need not exist yet. Any process may ask, one answers."""

    def __init__(
        self,
        folder: Path,
        *,
        request_of: Callable[[Mapping[str, Any]], R],
        outcome_of: Callable[[Mapping[str, Any]], E],
    ) -> None:
        """`request_of` and `outcome_of` read what `to_json` gave."""
        self.folder = folder
        self._request_of = request_of
        self._outcome_of = outcome_of
        self._known: dict[str, tuple[tuple[int, int, int], R]] = {}
        self._looked: int | None = None

    def ask(self, request: R) -> None:
        """Place a request, in place of one of its id; durable when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{request.id}{_REQUEST}", request.to_json())

    def open(self) -> Sequence[R]:
        """Requests that have not ended, oldest first. Cheap while nobody asks: one `stat` of the folder."""
        try:
            # A file that is renamed into it changes the folder, whether it is new or takes another's place.
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return ()
        if changed != self._looked or self._known:
            self._known = self._listed()
            # A file may come within the clock's tick in which we looked; such a fresh folder is looked at again.
            is_old = time.time_ns() - changed > _CLOCK_TICK_NS
            self._looked = changed if is_old else None
        # A request whose outcome was written just before a crash, or that was changed just as it ended, is here once
        # more; its outcome says that it is over.
        return [request for _, request in self._known.values() if not self._ended(request.id).exists()]

    def end(self, outcome: E) -> None:
        """Write how a request ended and remove it; a no-op for one that has ended."""
        path = self._ended(outcome.id)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, outcome.to_json())
        # Only now: dying before this line leaves a request that its outcome marks as ended.
        (self.folder / f"{outcome.id}{_REQUEST}").unlink(missing_ok=True)
        self._known.pop(f"{outcome.id}{_REQUEST}", None)
        for old in sorted(path.parent.glob("*.json"))[:-ENDED_KEPT]:
            old.unlink(missing_ok=True)

    def outcome(self, request_id: str) -> E | None:
        """How a request ended; `None` while it has not."""
        try:
            return self._outcome_of(json.loads(self._ended(request_id).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def outcomes(self) -> Iterator[E]:
        """Those that ended, newest first."""
        for path in sorted((self.folder / _ENDED).glob("*.json"), reverse=True):
            if (outcome := self.outcome(path.stem)) is not None:
                yield outcome

    def _listed(self) -> dict[str, tuple[tuple[int, int, int], R]]:
        """The requests by the names of their files; one that is as it was is not read again."""
        found: dict[str, tuple[tuple[int, int, int], R]] = {}
        for path in sorted(self.folder.glob(f"*{_REQUEST}")):
            try:
                status = path.stat()
                signature = (status.st_mtime_ns, status.st_ino, status.st_size)
                known = self._known.get(path.name)
                if known is None or known[0] != signature:
                    known = (signature, self._request_of(json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                # Somebody else's file, or one written by hand: a service must not stop for it.
                logger.error("a request cannot be read and is put aside", file=str(path), error=repr(error))
                path.rename(path.with_suffix(".unreadable"))
                continue
            found[path.name] = known
        return found

    def _ended(self, request_id: str) -> Path:
        return self.folder / _ENDED / f"{request_id}.json"


def new_id(asked_at: datetime) -> str:
    """An id for what is asked at that time; ids sort by time, to the microsecond.

    >>> new_id(datetime(2026, 5, 17, 20, 15))[:22]
    '20260517-201500-000000'
    """
    return f"{asked_at:%Y%m%d-%H%M%S}-{asked_at.microsecond:06}{uuid.uuid4().hex[:4]}"


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
