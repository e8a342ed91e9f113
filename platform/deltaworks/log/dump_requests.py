"""Dumps on demand: what may be asked of the process that holds the log, and how that ended.

    home/dumps/<source>/
        <id>.request.json   what is asked, and whether it is to run, pause or end: written by who asks
        <id>.missing.jsonl  keys that the source does not have, chunk by chunk
        ended/<id>.json     the outcome, written once by the holder of the log

See `RequestFolder`. How far a running dump is stands in the log's own groups, never here: two places could disagree.

The folder is one machine's. A standby on another machine goes on with what the log's groups hold of
a dump only where `home` is shared with it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

from deltaworks.capture.dump import TextKey
from deltaworks.errors import TerminalError
from deltaworks.request_folder import RequestFolder, new_id

_MISSING = ".missing.jsonl"


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
            id=new_id(asked_at),
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


class DumpRequests(RequestFolder[DumpRequest, DumpOutcome]):
    """The requests of one source; who holds its log answers them. See `RequestFolder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, request_of=DumpRequest.from_json, outcome_of=DumpOutcome.from_json)

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

    def note_missing(self, dump_id: str, *, first: int, keys: Sequence[TextKey]) -> None:
        """Keep the missing keys of the chunk that begins at the `first` asked key; durable when this returns.

        A chunk that is read again after a crash is noted again, and the later note counts.
        """
        with (self.folder / f"{dump_id}{_MISSING}").open("a", encoding="utf-8") as file:
            file.write(json.dumps([first, keys]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def missing(self, dump_id: str) -> tuple[TextKey, ...]:
        """All keys noted so far, in the order they were asked for."""
        path = self.folder / f"{dump_id}{_MISSING}"
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
        """See `RequestFolder.end`; the notes of missing keys go too."""
        super().end(outcome)
        (self.folder / f"{outcome.id}{_MISSING}").unlink(missing_ok=True)
