"""Which objects of an archive are of the log as it went on, after it was restored from there.

    timeline 0   ├─ 0 ─┼─ 100 ─┼─ 200 ─┤                   the folder is lost; groups from 160 on were never archived …
    timeline 1           restored up to group 159 ├─ 160.1 ─┼─ 230.1 ─►      … or are the begin of a transaction

A timeline begins with its first object; what older ones have from there on is not part of the log. Names are
00000000000000000160.sealed on timeline 0 and 00000000000000000160.1.sealed on timeline 1. The number of a folder's
timeline is in its file `timeline`, which one on timeline 0 has not.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.log.archive.place import ArchivePlace

NAME = "timeline"

_OBJECT = re.compile(r"(\d{20})(?:\.([1-9]\d*))?(\.sealed|\.segment)")


@dataclass(frozen=True, slots=True, order=True)
class ArchivedName:
    """The name of a segment in the archive, and what it says."""

    first: int
    timeline: int
    name: str


def name_on(timeline: int, file_name: str) -> str:
    """What a segment file of a folder on that timeline is called in the archive.

    >>> name_on(0, "00000000000000000160.sealed"), name_on(2, "00000000000000000160.sealed")
    ('00000000000000000160.sealed', '00000000000000000160.2.sealed')
    """
    first, _, suffix = file_name.partition(".")
    return f"{first}.{timeline}.{suffix}" if timeline else file_name


def names_in(objects: Iterable[str], place: ArchivePlace) -> list[ArchivedName]:
    """The segments among the objects of an archive."""
    below = place.object("")
    found = ((_OBJECT.fullmatch(name.removeprefix(below)), name.removeprefix(below)) for name in objects)
    return [ArchivedName(int(match[1]), int(match[2] or 0), name) for match, name in found if match is not None]


def live(names: Iterable[ArchivedName]) -> Sequence[ArchivedName]:
    """The names that are part of the log, oldest first, one for each segment.

    >>> names = [ArchivedName(0, 0, "0"), ArchivedName(100, 0, "100"), ArchivedName(200, 0, "200")]
    >>> [each.name for each in live([*names, ArchivedName(160, 1, "160.1")])]
    ['0', '100', '160.1']
    """
    kept: list[ArchivedName] = []
    begins: int | None = None
    by_timeline: dict[int, list[ArchivedName]] = {}
    for name in names:
        by_timeline.setdefault(name.timeline, []).append(name)
    for timeline in sorted(by_timeline, reverse=True):
        # A segment may be there in two forms, plain and sealed; either will do.
        segments = {name.first: name for name in sorted(by_timeline[timeline], reverse=True)}
        kept += (name for first, name in segments.items() if begins is None or first < begins)
        begins = min(segments) if begins is None else min(begins, *segments)
    return sorted(kept)


def read_timeline(folder: Path) -> int:
    """The timeline of a log folder."""
    try:
        return int((folder / NAME).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0


def write_timeline(folder: Path, timeline: int) -> None:
    """Put a folder on a timeline; to be synced by whoever makes the folder."""
    (folder / NAME).write_text(f"{timeline}\n", encoding="ascii")
