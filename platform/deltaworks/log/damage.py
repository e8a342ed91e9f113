"""What is known of damage to a local log, in the folder `damaged` of the log's folder.

    00000000000000018025.suspect                     a reader could not read this group      written by any reader
    00000000000000018025.mend                        a person wants it mended                written by `log mend`
    00000000000000018025-00000000000000018027.lost   these are named gaps, owed or dumped    written by the log's writer
    00000000000000018021.segment                     the damaged file itself, set aside      never removed by us

A suspect is a word to whoever writes the log, which alone may rewrite it; it looks for itself. What is lost is noted
before the gap is published, so that a gap without a repair cannot be.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from deltaworks.capture.continuity import Gap
from deltaworks.capture.proof import WindowSet
from deltaworks.log.segment_file import sync_folder
from deltaworks.position import Lsn
from deltaworks.request_folder import write_json

FOLDER = "damaged"

_SUSPECT, _ASKED, _LOST = ".suspect", ".mend", ".lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostGroups:
    """Groups `first` to `last`, whose changes are lost: named gaps in the log from now on.

    `changes` were in them, of `tables` as far as their headers can be read, `None` where that is not known and it may
    be any; `changes` is 0 then where that is not known either. `windows` are those of the headers that can be read.
    `files` are the damaged ones, set aside. `taken_at` is the group of the log with which capture took over the repair;
    until then it is owed.
    """

    first: int
    last: int
    since: Lsn
    until: Lsn
    changes: int
    tables: tuple[str, ...] | None
    what: str
    noticed_at: datetime
    files: tuple[str, ...] = ()
    windows: WindowSet = field(default_factory=WindowSet)
    taken_at: int | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        return cls(
            first=stored["first"],
            last=stored["last"],
            since=Lsn(stored["since"]),
            until=Lsn(stored["until"]),
            changes=stored["changes"],
            tables=None if stored["tables"] is None else tuple(stored["tables"]),
            what=stored["what"],
            noticed_at=datetime.fromisoformat(stored["noticed_at"]),
            files=tuple(stored["files"]),
            windows=WindowSet.from_json(stored["windows"]),
            taken_at=stored["taken_at"],
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """As JSON values; no row data."""
        return {
            "first": self.first,
            "last": self.last,
            "since": self.since.value,
            "until": self.until.value,
            "changes": self.changes,
            "tables": None if self.tables is None else list(self.tables),
            "what": self.what,
            "noticed_at": self.noticed_at.isoformat(),
            "files": list(self.files),
            "windows": self.windows.to_json(),
            "taken_at": self.taken_at,
        }

    @property
    def groups(self) -> str:
        """Which they are, for people."""
        return f"group {self.first}" if self.first == self.last else f"groups {self.first} to {self.last}"

    @property
    def may_have_changes(self) -> bool:
        """Whether any change may have been in them."""
        return bool(self.changes) or self.tables is None

    @property
    def gap(self) -> Gap:
        """The gap that capture repairs, in the words of a source's positions."""
        reason = f"{self.groups} of the log were damaged: {self.what}"
        return Gap(since=self.since, until=self.until, reason=reason, noticed_at=self.noticed_at)

    @property
    def summary(self) -> str:
        """One line for people."""
        of = "tables that are not known" if self.tables is None else ", ".join(self.tables) or "no table"
        changes = f"{self.changes:,} changes" if self.changes or self.tables is not None else "changes"
        return f"{self.groups}, {changes} of {of}: {self.what}"


def note_suspect(folder: Path, sequence: int, what: str) -> None:
    """Leave word that a group of a log cannot be read; a reader that may not write there leaves none."""
    with suppress(OSError):
        _leave_word(_word(folder, sequence, _SUSPECT), what)


def ask_to_mend(folder: Path, sequence: int, what: str) -> None:
    """Leave word that a person wants such a group to be mended."""
    _leave_word(_word(folder, sequence, _ASKED), what)


def suspects(folder: Path, *, is_asked_only: bool = False) -> list[int]:
    """The groups that somebody could not read, in order. Cheap where nothing was ever damaged."""
    kinds = (_ASKED,) if is_asked_only else (_SUSPECT, _ASKED)
    return sorted({int(name.partition(".")[0]) for name in _names(folder) if name.endswith(kinds)})


def clear_suspect(folder: Path, sequence: int) -> None:
    """Take every word back: the group can be read, or is not kept any more."""
    for kind in (_SUSPECT, _ASKED):
        _word(folder, sequence, kind).unlink(missing_ok=True)


def lost_groups(folder: Path) -> Sequence[LostGroups]:
    """Every gap that was ever made, in the order of the log."""
    names = sorted(name for name in _names(folder) if name.endswith(_LOST))
    stored = [json.loads((folder / FOLDER / name).read_text(encoding="utf-8")) for name in names]
    return [LostGroups.from_json(each) for each in stored]


def note_lost(folder: Path, lost: LostGroups) -> None:
    """Keep what is about to become a gap; a no-op where a life before noted the same. Durable when this returns."""
    if not _lost(folder, lost).exists():
        (folder / FOLDER).mkdir(exist_ok=True)
        sync_folder(folder)
        write_json(_lost(folder, lost), lost.to_json())


def note_taken(folder: Path, lost: LostGroups, *, sequence: int) -> None:
    """Note that the repair is in the log's progress, from a group on; durable when this returns."""
    write_json(_lost(folder, lost), replace(lost, taken_at=sequence).to_json())


def set_aside(path: Path) -> str:
    """Give a damaged file a second name that says so, and tell it; a no-op the second time. Durable on return."""
    folder = path.parent / FOLDER
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        aside = folder / (path.name if number == 1 else f"{path.stem}.{number}{path.suffix}")
        try:
            os.link(path, aside)
        except FileExistsError:
            if not aside.samefile(path):
                number += 1
                continue
        sync_folder(folder)
        return f"{FOLDER}/{aside.name}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder / FOLDER)
    except FileNotFoundError:
        return []


def _word(folder: Path, sequence: int, kind: str) -> Path:
    return folder / FOLDER / f"{sequence:020d}{kind}"


def _leave_word(path: Path, what: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(what, encoding="utf-8")


def _lost(folder: Path, lost: LostGroups) -> Path:
    return folder / FOLDER / f"{lost.first:020d}-{lost.last:020d}{_LOST}"
