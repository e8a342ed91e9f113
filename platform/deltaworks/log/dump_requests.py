"""Dumps on demand: how a request reaches the process that holds the log, and how it ends.

    home/dumps/<source>/
        <id>.request.json   what is asked, and whether it is to run, pause or end: written by who asks
        <id>.missing.jsonl  keys that the source does not have, chunk by chunk
        ended/<id>.json     the outcome, written once by the holder of the log

Every JSON file is written beside its place and renamed, so a reader meets all of it or nothing. How
far a running dump is stands in the log's own groups, never here: two places could disagree.

The folder is one machine's. A standby on another machine goes on with what the log's groups hold of
a dump only where `home` is shared with it.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

import structlog

from deltaworks.capture.dump import TextKey
from deltaworks.errors import TerminalError

ENDED_KEPT = 200
"""Outcomes kept for people to look at; older ones are removed."""

_REQUEST, _MISSING, _ENDED = ".request.json", ".missing.jsonl", "ended"

logger = structlog.get_logger(__name__)


class UnknownDumpError(TerminalError):
    """No dump of that id is under way."""


class Wanted(Enum):
    """What whoever asked wants of a dump now."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Ending(Enum):
    """How a dump ended."""

    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpRequest:
    """A dump that somebody asked for.

    `tables` are names as they were given, each once. With `keys` (texts in key order, each once)
    there is one table and only its rows of these keys are read; with `where`, a condition in the
    source's own SQL, only the rows it holds for.
    """

    id: str
    tables: tuple[str, ...]
    keys: tuple[TextKey, ...] = ()
    where: str | None = None
    asked_at: datetime
    wanted: Wanted = Wanted.RUN

    @classmethod
    def new(cls, tables: Iterable[str], *, keys: Iterable[TextKey] = (), where: str | None = None) -> Self:
        """A request with an id of its own; ids sort by time."""
        asked_at = datetime.now(UTC)
        return cls(
            id=f"{asked_at:%Y%m%d-%H%M%S}-{asked_at.microsecond // 1000:03}{uuid.uuid4().hex[:4]}",
            tables=tuple(dict.fromkeys(tables)),
            keys=tuple(dict.fromkeys(keys)),
            where=where,
            asked_at=asked_at,
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(
            id=stored["id"],
            tables=tuple(stored["tables"]),
            keys=tuple(tuple(key) for key in stored["keys"]),
            where=stored["where"],
            asked_at=datetime.fromisoformat(stored["asked_at"]),
            wanted=Wanted(stored["wanted"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The request as JSON values."""
        return asdict(self) | {"asked_at": self.asked_at.isoformat(), "wanted": self.wanted.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpOutcome:
    """How a dump ended. `rows` counts the rows it gave out, by the table's full name.

    `missing` are the asked keys that the source does not have, as the source spells them. Each of them
    that its table could hold has a delete in the log.
    """

    id: str
    ending: Ending
    rows: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[TextKey, ...] = ()
    unknown_tables: tuple[str, ...] = ()
    error: str | None = None
    asked_at: datetime
    ended_at: datetime

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(
            id=stored["id"],
            ending=Ending(stored["ending"]),
            rows=stored["rows"],
            missing=tuple(tuple(key) for key in stored["missing"]),
            unknown_tables=tuple(stored["unknown_tables"]),
            error=stored["error"],
            asked_at=datetime.fromisoformat(stored["asked_at"]),
            ended_at=datetime.fromisoformat(stored["ended_at"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The outcome as JSON values."""
        times = {"asked_at": self.asked_at.isoformat(), "ended_at": self.ended_at.isoformat()}
        return asdict(self) | times | {"ending": self.ending.value, "rows": dict(self.rows)}


class DumpRequests:
    """The requests of one source, in a folder that need not exist yet. Any process may ask, one answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[tuple[int, int, int], DumpRequest]] = {}

    def ask(self, request: DumpRequest) -> None:
        """Place a request; durable when this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / f"{request.id}{_REQUEST}", request.to_json())

    def want(self, dump_id: str, wanted: Wanted) -> None:
        """Say what is wanted of a dump that is under way; its holder sees it within a moment.

        Raises:
            UnknownDumpError: there is none of that id, or it has ended.
        """
        known = {request.id: request for request in self.open()}
        if dump_id not in known:
            listing = ", ".join(known) or "none"
            raise UnknownDumpError(f"cannot {wanted.value} the dump {dump_id!r}: it is not under way; known: {listing}")
        self.ask(replace(known[dump_id], wanted=wanted))

    def open(self) -> Sequence[DumpRequest]:
        """Requests that have not ended, oldest first. Cheap to ask for again: an unchanged file is not read twice."""
        found: dict[Path, tuple[tuple[int, int, int], DumpRequest]] = {}
        for path in self._listed():
            try:
                status = path.stat()
                signature = (status.st_mtime_ns, status.st_ino, status.st_size)
                known = self._read.get(path)
                if known is None or known[0] != signature:
                    known = (signature, DumpRequest.from_json(json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                # Somebody else's file, or one written by hand: capture must not stop for it.
                logger.error("a dump's request cannot be read and is put aside", file=str(path), error=repr(error))
                path.rename(path.with_suffix(".unreadable"))
                continue
            found[path] = known
        self._read = found
        # A request whose wish changed just as it ended is here once more; its outcome says that it is over.
        return [request for _, request in found.values() if not self._ended(request.id).exists()]

    def note_missing(self, dump_id: str, *, first: int, keys: Sequence[TextKey]) -> None:
        """Keep the missing keys of the chunk that begins at the `first` asked key; durable when this returns.

        A chunk that is read again after a crash is noted again, and the later note counts.
        """
        with (self._folder / f"{dump_id}{_MISSING}").open("a", encoding="utf-8") as file:
            file.write(json.dumps([first, keys]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def missing(self, dump_id: str) -> tuple[TextKey, ...]:
        """All keys noted so far, in the order they were asked for."""
        path = self._folder / f"{dump_id}{_MISSING}"
        if not path.exists():
            return ()
        chunks: dict[int, list[list[str]]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            # A crash can leave half a line; its chunk is read again.
            try:
                first, keys = json.loads(line)
            except json.JSONDecodeError:
                continue
            chunks[first] = keys
        return tuple(tuple(key) for first in sorted(chunks) for key in chunks[first])

    def end(self, outcome: DumpOutcome) -> None:
        """Write how a dump ended and close its request; a no-op for one that has ended."""
        path = self._ended(outcome.id)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, outcome.to_json())
        # Only now: dying before this line leaves a request that its outcome marks as ended.
        for name in (_REQUEST, _MISSING):
            (self._folder / f"{outcome.id}{name}").unlink(missing_ok=True)
        for old in sorted(path.parent.glob("*.json"))[:-ENDED_KEPT]:
            old.unlink(missing_ok=True)

    def outcome(self, dump_id: str) -> DumpOutcome | None:
        """How a dump ended; `None` while it has not."""
        try:
            return DumpOutcome.from_json(json.loads(self._ended(dump_id).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def outcomes(self) -> Iterator[DumpOutcome]:
        """The dumps that ended, newest first."""
        for path in sorted((self._folder / _ENDED).glob("*.json"), reverse=True):
            if (outcome := self.outcome(path.stem)) is not None:
                yield outcome

    def _listed(self) -> list[Path]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return [self._folder / name for name in sorted(names) if name.endswith(_REQUEST)]

    def _ended(self, dump_id: str) -> Path:
        return self._folder / _ENDED / f"{dump_id}.json"


def _write(path: Path, values: Mapping[str, Any]) -> None:  # Any: JSON values
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
