"""Copies closed segments into the archive, the oldest first, each once and never over another.

    hash the file ─► PUT If-None-Match: *, with its checksum ─► note it in `archived` ─► the next one
    died at     1                                         2                        3
    1  nothing was written     2  the next time the store refuses it, as the same: noted then     3  it is done

A segment is sealed first where the log's settings say so, and read as a whole: a damaged one stays here and is named.
The store refuses a second writer, so two that archive the same log do no harm, and what it has already is compared by
checksum: the same is as good as written, anything else stops the archive there.
"""

import base64
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import IO

import structlog

from deltaworks import faults
from deltaworks.errors import RetryableError
from deltaworks.log.archive.manifest import NAME, Archived, add_archived, read_manifest
from deltaworks.log.archive.place import ArchiveConflictError, ArchivePlace
from deltaworks.log.archive.timelines import live, name_on, names_in, read_timeline
from deltaworks.log.change_log import CorruptLogError, LogBusyError
from deltaworks.log.end_file import read_end
from deltaworks.log.local_reader import LocalLogReader
from deltaworks.log.sealing import seal_segment
from deltaworks.log.segment_file import closed_file, maintaining, segments
from deltaworks.object_store import StoreClient

logger = structlog.get_logger(__name__)


class ArchiveBusyError(RetryableError):
    """Another process writes the same segment to the archive at this moment."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A closed segment that is not in the archive yet."""

    first: int
    last: int


def pending(folder: Path) -> Sequence[Pending]:
    """What is to be archived, oldest first; opens no segment, so it costs little also where there are thousands."""
    published = read_end(folder)
    if published is None:
        return ()
    archived = read_manifest(folder)
    # Behind a closed segment is a group that every reader sees, not just the parts of an unfinished transaction.
    return [
        Pending(first, following - 1)
        for first, following in pairwise(segments(folder))
        if first not in archived and following < published.count
    ]


def archive_log(folder: Path, place: ArchivePlace, *, seal_level: int | None = None) -> Sequence[Archived]:
    """Archive what is pending; what came into the archive with this call. Any process may, at any time.

    With a `seal_level` segments are sealed before; one that cannot be now, on a full disk, goes as it is.

    Raises:
        CorruptLogError: a segment is damaged here.
        ConditionalWriteError: the store does not refuse a second writer.
        ArchiveConflictError: it has another content under a segment's name.
        ObjectStoreDeniedError: the keys may not write there, or there is no such bucket.
        ObjectStoreDownError: it does not answer; the same call goes on where this one stopped.
    """
    done: list[Archived] = []
    if not pending(folder):
        return done
    with place.store.opened() as client:
        client.refuse_second_writer()
        if not (folder / NAME).exists():
            add_archived(folder, *_found_again(folder, place, client))
        for segment in pending(folder):
            if seal_level is not None:
                with suppress(LogBusyError, CorruptLogError, OSError), maintaining(folder):
                    seal_segment(folder, segment.first, level=seal_level)
            _check_is_whole(folder, segment)
            archived = _upload(folder, segment, place, client)
            faults.reach("archive.after_put")
            add_archived(folder, archived)
            faults.reach("archive.after_note")
            done.append(archived)
    return done


def _check_is_whole(folder: Path, segment: Pending) -> None:
    """What is damaged must not get a checksum that says it is not, and must not be removed here."""
    groups = LocalLogReader(folder).read(after_sequence=segment.first - 1)
    deque(islice(groups, segment.last - segment.first + 1), maxlen=0)


def _upload(folder: Path, segment: Pending, place: ArchivePlace, client: StoreClient) -> Archived:
    with closed_file(folder, segment.first) as file:
        path = Path(file.name)
        digest = hash_of(file)
        name = name_on(read_timeline(folder), path.name)
        archived = Archived(name=name, first=segment.first, last=segment.last, bytes=file.tell(), sha256=digest.hex())
        file.seek(0)
        faults.reach("archive.before_put")
        position = LocalLogReader(folder).header(segment.last + 1).previous_position
        is_new = client.put_first(
            place.object(name),
            file,
            ContentLength=archived.bytes,
            ChecksumSHA256=base64.b64encode(digest).decode(),
            Metadata={"sha256": archived.sha256, "last": str(segment.last), "position": str(position)},
        )
    if not is_new:
        _check_is_same(archived, place, client)
    logger.info("archived a segment", log=place.log, segment=name, bytes=archived.bytes, is_new=is_new)
    return archived


def _check_is_same(archived: Archived, place: ArchivePlace, client: StoreClient) -> None:
    found = client.metadata(place.object(archived.name))
    if found is None:
        # Two wrote it at the same time and the store took neither, or it was removed at this moment.
        raise ArchiveBusyError(f"cannot archive {place.url(archived.name)!r}: somebody else is just at it; try again")
    if (found.get("sha256"), found["size"]) != (archived.sha256, str(archived.bytes)):
        raise ArchiveConflictError(
            f"cannot archive {place.url(archived.name)!r}: the store has another content under that name, "
            f"{found['size']} bytes with sha256 {found.get('sha256', 'unknown')!r} where this log has {archived.bytes} "
            f"bytes with {archived.sha256!r}; nothing was overwritten. Another log is archived there, or this one was "
            f"made anew: set log.archive.prefix of {place.log!r} to a place of its own"
        )


def _found_again(folder: Path, place: ArchivePlace, client: StoreClient) -> Iterator[Archived]:
    """What the archive has right before the oldest local segment, for a folder whose list was lost."""
    following = min(segments(folder), default=0)
    position = str(LocalLogReader(folder).header(following).previous_position) if following else ""
    for found in reversed(live(names_in(client.names(place.object("")), place))):
        if found.first >= following:
            continue
        beside: Mapping[str, str] = client.metadata(place.object(found.name)) or {}
        is_ours = position in ("", beside.get("position"))
        # Behind its last group may be the start of a transaction whose other parts were lost before a restore.
        if int(beside.get("last", -1)) < following - 1 or not is_ours:
            return
        yield Archived(
            name=found.name, first=found.first, last=following - 1, bytes=int(beside["size"]), sha256=beside["sha256"]
        )
        following, position = found.first, ""


def hash_of(file: IO[bytes]) -> bytes:
    """The SHA-256 of a file from where it stands to its end."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.digest()
