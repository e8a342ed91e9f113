"""Makes the folder of a log that was lost anew, from its archive; reads the archive only.

    list, HEAD each ─► NAME.restoring: `archived`, `timeline`, the last segment, an empty one, `end` ─► rename to NAME
    died at          1                                                                                2
    1  nothing is there under the log's name; the next call begins anew     2  it is restored

Only the last segment is fetched, for the writer; the others are read where they are. The log ends with the last group
of the archive that readers saw: of a transaction that goes on in a segment that is lost, nothing is kept.

What is appended from then on differs from what was lost, so it is archived under names of its own, as PostgreSQL does
after a recovery: timeline 1 after the first restore, 2 after the next. See `timelines`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.log.archive.fetch import fetch
from deltaworks.log.archive.manifest import Archived, add_archived
from deltaworks.log.archive.place import ArchivePlace, CorruptArchiveError
from deltaworks.log.archive.timelines import ArchivedName, live, names_in, write_timeline
from deltaworks.log.change_log import GroupHeader
from deltaworks.log.end_file import NAME as END_FILE
from deltaworks.log.end_file import write_end
from deltaworks.log.lock import LOCK_FILE, take_lock
from deltaworks.log.segment import encode_head, frames
from deltaworks.log.segment_file import opened, segment_name, sync_folder
from deltaworks.object_store import StoreClient
from deltaworks.position import Lsn

DRAFT = ".restoring"
_HEADS_AT_ONCE = 16

logger = structlog.get_logger(__name__)


class LogThereError(TerminalError):
    """A log is where one should be restored; nothing was touched."""


class NothingArchivedError(TerminalError):
    """There is no archive to restore a log from, or nothing in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A log that begins with group `first` and ends with `last`, at `position`; `segments` lie in its archive.

    `lost` are objects of the archive that nothing leads to: those behind them are not there any more.
    """

    first: int
    last: int
    position: Lsn
    segments: int
    bytes: int
    lost: Sequence[str] = ()


def restore_log(folder: Path, place: ArchivePlace) -> Restored:
    """Make a log folder anew that is not there; whole or not there at all, whenever the process dies.

    Raises:
        LogThereError: it is there.
        FencedError: another process restores it at this moment.
        NothingArchivedError: the archive has nothing of it.
        CorruptArchiveError: the last segment, or what was written beside one, comes back otherwise than it went there.
        ObjectStoreDeniedError: the keys may not read there, or there is no such bucket.
        ObjectStoreDownError: the store does not answer.
    """
    _check_is_free(folder)
    draft = folder.with_name(folder.name + DRAFT)
    draft.mkdir(parents=True, exist_ok=True)
    lock = take_lock(draft)
    try:
        # What a life before left.
        _clear(draft)
        restored = _restore(draft, place)
        _sync(draft)
        faults.reach("archive.before_restored")
        _check_is_free(folder)
        _name(draft, folder)
        sync_folder(folder.parent)
        faults.reach("archive.after_restored")
    except BaseException:
        _clear(draft)
        raise
    finally:
        os.close(lock)
    logger.info("restored a log from its archive", log=place.log, last=restored.last, position=str(restored.position))
    return restored


def _check_is_free(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise LogThereError(
            f"cannot restore the log {str(folder)!r}: something is there, and nothing of it was touched; stop what "
            "writes it and move the folder away, then restore"
        )


def _name(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError as error:
        # The kernel refuses it where anything came into the folder meanwhile.
        _check_is_free(folder)
        raise error


def _clear(draft: Path) -> None:
    # It has the log's own name by now where only the last sync failed.
    for path in draft.iterdir() if draft.exists() else ():
        if path.name != LOCK_FILE:
            path.unlink()


def _restore(draft: Path, place: ArchivePlace) -> Restored:
    with place.store.opened() as client:
        names = names_in(client.names(place.object("")), place)
        archived, lost = _archived(live(names), place, client)
        if not archived:
            raise NothingArchivedError(
                f"cannot restore the log {place.log!r}: {place.url()!r} has no segment of it; look at log.archive, or "
                "let capture begin a new log, with a dump"
            )
        last = _fetch_last(draft, archived, place, client)
    add_archived(draft, *archived)
    write_timeline(draft, max(name.timeline for name in names) + 1)
    # The writer appends to a plain segment that begins where the last one is to end.
    (draft / segment_name(last.sequence + 1)).touch()
    descriptor = os.open(draft / END_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        write_end(descriptor, epoch=last.epoch, count=last.sequence + 1, last=encode_head(last))
    finally:
        os.close(descriptor)
    return Restored(
        first=archived[0].first,
        last=last.sequence,
        position=last.position,
        segments=len(archived),
        bytes=sum(segment.bytes for segment in archived),
        lost=lost,
    )


def _archived(
    names: Sequence[ArchivedName], place: ArchivePlace, client: StoreClient
) -> tuple[list[Archived], list[str]]:
    """The newest segments without a hole between them, oldest first; and the names of those from before a hole."""

    def described(name: ArchivedName) -> Archived:
        beside = client.metadata(place.object(name.name)) or {}
        try:
            last, digest, size = int(beside["last"]), beside["sha256"], int(beside["size"])
        except (KeyError, ValueError) as error:
            raise CorruptArchiveError(
                f"cannot restore the log {place.log!r}: {place.url(name.name)!r} lacks what was written beside it; put "
                "back the object as it was, with its metadata"
            ) from error
        return Archived(name=name.name, first=name.first, last=last, bytes=size, sha256=digest)

    with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
        found = list(pool.map(described, names))
    kept: list[Archived] = []
    while found and (not kept or found[-1].last >= kept[0].first - 1):
        segment = found.pop()
        kept.insert(0, segment.up_to(kept[0].first - 1) if kept else segment)
    return kept, [segment.name for segment in found]


def _fetch_last(draft: Path, archived: list[Archived], place: ArchivePlace, client: StoreClient) -> GroupHeader:
    """The last group that readers saw, with its segment in the folder; what is only behind it is left out."""
    while archived:
        segment = archived[-1]
        fetch(segment, place, client, into=draft / segment.file_name, folder=draft)
        last = None
        with opened(draft, segment.first) as file:
            for frame in frames(file.bytes):
                header = frame.header()
                last = header if not header.is_partial and header.sequence <= segment.last else last
        if last is not None:
            archived[-1] = segment.up_to(last.sequence)
            return last
        # A transaction that takes more than the whole segment, and goes on in one that is lost.
        (draft / segment.file_name).unlink()
        archived.pop()
    raise NothingArchivedError(
        f"cannot restore the log {place.log!r}: {place.url()!r} has the begin of one transaction and not its end; let "
        "capture begin a new log, with a dump"
    )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)
