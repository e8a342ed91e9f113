"""Brings one segment from an archive to a file, compared with its checksum; the file is whole or not there."""

import os
import tempfile
from pathlib import Path

import structlog

from deltaworks import faults
from deltaworks.log.archive.manifest import Archived
from deltaworks.log.archive.place import ArchivePlace, CorruptArchiveError
from deltaworks.log.archive.upload import hash_of
from deltaworks.log.change_log import ArchivedSegmentGoneError
from deltaworks.object_store import StoreClient

UNFINISHED = ".part"
"""What a file that is being fetched ends with."""

logger = structlog.get_logger(__name__)


def fetch(archived: Archived, place: ArchivePlace, client: StoreClient, *, into: Path, folder: Path) -> None:
    """Fetch a segment of the log in `folder`, for messages, into a file; replaces one that is there.

    Raises:
        ArchivedSegmentGoneError: the archive does not have it any more.
        CorruptArchiveError: it comes back otherwise than it went there.
        ObjectStoreDownError: the store does not answer.
        ObjectStoreDeniedError: the keys may not read there.
    """
    name = place.object(archived.name)
    descriptor, draft = tempfile.mkstemp(dir=into.parent, prefix=into.name, suffix=UNFINISHED)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            is_there = client.read(name, file)
            file.seek(0)
            found = hash_of(file).hex()
        faults.reach("archive.before_keep")
        if not is_there:
            raise ArchivedSegmentGoneError(
                f"cannot read groups {archived.first} to {archived.last} of the log {str(folder)!r}: they "
                f"were removed here after they went to {place.url(archived.name)!r}, and that is gone; put "
                "it back, or stop the log's services, remove its folder and what its readers have made, then "
                f"run `deltaworks dump {place.log}`"
            )
        if found != archived.sha256:
            raise CorruptArchiveError(
                f"cannot read groups {archived.first} to {archived.last} from {place.url(archived.name)!r}: "
                f"it has sha256 {found!r} and went there with {archived.sha256!r}; restore an older version of "
                "that object or a copy of it, or remove the log and dump the source again"
            )
        Path(draft).replace(into)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    logger.info("fetched a segment from the archive", log=place.log, segment=archived.name)
