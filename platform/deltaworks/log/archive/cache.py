"""Segments from the archive for readers, in a folder of copies that does not grow beyond a bound.

    read group 7 ─► here? ──no──► in the cache, and sound? ──no──► GET, checksum ─► rename into the cache ─► read
                     │yes                 │yes
                     ▼                    ▼
                    read                 read                      older copies go until it fits

While a segment is read the next one is fetched, and no more than that, so that a reader of the whole log seldom waits
for the store. Both have to fit the bound; where they do not, nothing is fetched ahead.

A copy is compared with its checksum when a process uses it for the first time and whenever the file was touched
since; a damaged one is fetched again. Any number of processes share the folder.
"""

import os
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import structlog

from deltaworks.log.archive.fetch import UNFINISHED, fetch
from deltaworks.log.archive.manifest import NAME, Archived, read_manifest
from deltaworks.log.archive.place import ArchivePlace
from deltaworks.log.archive.upload import hash_of
from deltaworks.object_store import StoreClient

_UNFINISHED_S = 3_600.0
"""Age at which a download that nobody ended is removed."""

logger = structlog.get_logger(__name__)

_Identity = tuple[int, int, int]


class ArchivedSegments:
    """What a log has in its archive, fetched when it is asked for. Thread-safe; opens nothing before that."""

    def __init__(self, folder: Path, place: ArchivePlace, *, cache: Path, cache_bytes: int) -> None:
        """`folder` is the log's, which has the list of what is archived."""
        self._folder = folder
        self._place = place
        self._cache = cache
        self._cache_bytes = cache_bytes
        # The second is of the one download, which those who find their segment in the cache do not wait for.
        self._lock, self._downloading = threading.Lock(), threading.Lock()
        self._expecting: threading.Thread | None = None
        self._listed: tuple[_Identity, Mapping[int, Archived]] | None = None
        self._sound: dict[str, _Identity] = {}
        self._client: StoreClient | None = None

    def firsts(self) -> Collection[int]:
        """The first sequence of each archived segment, in order."""
        return self._manifest().keys()

    def fetch(self, first: int) -> Path:
        """The folder that has the segment's file now; another process may remove it from there at any time.

        Raises:
            ArchivedSegmentGoneError: the archive does not have it any more.
            CorruptArchiveError: it comes back otherwise than it went there.
            ObjectStoreDownError: the store does not answer.
            ObjectStoreDeniedError: the keys may not read there.
        """
        archived = self._manifest()[first]
        if not self._is_used(archived):
            with self._downloading:
                # It may have come ahead, while this waited.
                if not self._is_used(archived):
                    self._download(archived)
        return self._cache

    def expect(self, first: int, *, beside: int) -> None:
        """See `SegmentSource.expect`."""
        listed = self._manifest()
        wanted, read = listed.get(first), listed.get(beside)
        if wanted is None or wanted.bytes + (0 if read is None else read.bytes) > self._cache_bytes:
            return
        with self._lock:
            if self._expecting is not None and self._expecting.is_alive():
                return
            # A daemon: a process that ends waits for no segment that nobody will read.
            self._expecting = threading.Thread(target=self._fetch_ahead, args=(first,), name="fetch-ahead", daemon=True)
            self._expecting.start()

    def _fetch_ahead(self, first: int) -> None:
        try:
            self.fetch(first)
        except Exception as error:
            # Whoever reads on asks for it again, and is told then.
            logger.warning("a segment was not fetched ahead", log=self._place.log, segment=first, error=str(error))

    def _is_used(self, archived: Archived) -> bool:
        """Whether a sound copy is in the cache, which is used now."""
        with self._lock:
            if not self._is_sound(archived):
                return False
            # Only the time of use: whoever looks at the time of change sees whether the content was touched.
            with suppress(FileNotFoundError):
                changed_ns = (self._cache / archived.file_name).stat().st_mtime_ns
                os.utime(self._cache / archived.file_name, ns=(time.time_ns(), changed_ns))
            return True

    def _manifest(self) -> Mapping[int, Archived]:
        identity = _identity(self._folder / NAME)
        if identity is None:
            return {}
        listed = self._listed
        if listed is None or listed[0] != identity:
            listed = self._listed = identity, read_manifest(self._folder)
        return listed[1]

    def _is_sound(self, archived: Archived) -> bool:
        path = self._cache / archived.file_name
        identity = _identity(path)
        if identity is None:
            return False
        if self._sound.get(archived.name) == identity:
            return True
        with suppress(FileNotFoundError):
            with path.open("rb") as file:
                is_sound = hash_of(file).hex() == archived.sha256
            if is_sound:
                self._sound[archived.name] = identity
                return True
            logger.warning("a cached segment is damaged; it is fetched again", file=str(path))
        return False

    def _download(self, archived: Archived) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        self._make_room(archived)
        into = self._cache / archived.file_name
        fetch(archived, self._place, self._connected(), into=into, folder=self._folder)
        identity = _identity(self._cache / archived.file_name)
        if identity is not None:
            with self._lock:
                self._sound[archived.name] = identity

    def _connected(self) -> StoreClient:
        """The connection to the store; made once, for that takes longer than to fetch a segment."""
        if self._client is None:
            with ExitStack() as stack:
                self._client = stack.enter_context(self._place.store.opened())
                weakref.finalize(self, stack.pop_all().close)
        return self._client

    def _make_room(self, wanted: Archived) -> None:
        """Remove the copies that were used the longest ago until a new one fits."""
        copies = []
        for path in self._cache.iterdir():
            with suppress(FileNotFoundError):
                copies.append((path.stat(), path))
        room = self._cache_bytes - wanted.bytes - sum(facts.st_size for facts, _ in copies)
        for facts, path in sorted(copies, key=lambda copy: copy[0].st_atime_ns):
            is_being_written = path.suffix == UNFINISHED and time.time() - facts.st_mtime < _UNFINISHED_S
            if is_being_written or (room >= 0 and path.suffix != UNFINISHED):
                continue
            path.unlink(missing_ok=True)
            room += facts.st_size


def _identity(path: Path) -> _Identity | None:
    """What changes when a file is replaced or written to."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
