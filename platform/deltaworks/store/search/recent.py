"""Recent documents: durable, and seen by readers, before tantivy has them.

    flush ──► a frame in recent-7, synced ──► the record names its length: readers have it
              a second later ──► tantivy's commit ──► the record names recent-8 only, and recent-7 goes

A commit of tantivy writes and syncs some thirty files, for ten documents as for a thousand; a frame is one write and
one sync. So many flushes share a commit, and nobody waits for it.

A frame is the length of what follows and its CRC-32 (two little-endian words of 32 bits), then MessagePack: a list of
`Recent`. Frames of a file are never changed; a file is never written again by another life of the writer.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from deltaworks import faults
from deltaworks.log.segment_file import sync_folder
from deltaworks.position import Lsn, Version
from deltaworks.store.search.layout import FreshnessRecord, IndexLayoutError, how_to_rebuild

_PREFIX = "recent-"
_HEAD = struct.Struct("<II")


class Recent(msgspec.Struct, frozen=True, array_like=True):
    """A document as tantivy will get it. `body` is JSON in UTF-8; `None` is a tombstone."""

    key: str
    position: int
    ordinal: int
    popularity: float
    body: bytes | None

    @property
    def version(self) -> Version:
        """Its external version."""
        return Version(Lsn(self.position), self.ordinal)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Recent])


@dataclass(slots=True, eq=False)
class RecentFile:
    """One file of recent documents: `documents` are the newest of each key, in its first `size` bytes."""

    path: Path
    number: int
    documents: dict[str, Recent]
    size: int
    _descriptor: int | None = None

    @classmethod
    def create(cls, folder: Path, number: int) -> Self:
        """Make a file; it is in the folder after a power cut too.

        Raises:
            OSError: the disk is full, or the folder may not be written.
        """
        path = folder / f"{_PREFIX}{number}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        sync_folder(folder)
        return cls(path, number, {}, 0, descriptor)

    def append(self, documents: Mapping[str, Recent]) -> None:
        """Make the documents durable, all or none. After an error, nothing may be appended any more.

        Raises:
            OSError: the disk is full, or failed.
        """
        if self._descriptor is None:
            raise ValueError(f"cannot append to {str(self.path)!r}: it was closed; make another file")
        payload = _encoder.encode(list(documents.values()))
        frame = memoryview(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
        faults.reach("search.before_append")
        written = 0
        while written < len(frame):
            written += os.write(self._descriptor, frame[written:])
        os.fdatasync(self._descriptor)
        faults.reach("search.after_append")
        self.size += len(frame)
        self.documents.update(documents)

    def close(self) -> None:
        """Take no more. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Let the file go; tantivy has what was in it."""
        self.close()
        self.path.unlink(missing_ok=True)


def left_behind(folder: Path, claimed: Mapping[int, int]) -> list[RecentFile]:
    """The files that another life of the writer left, oldest first; what a crash cut off at the end is passed over.

    `claimed` is how many bytes of each the record names: those were durable before they were named. All that is given
    is durable too.

    Raises:
        IndexLayoutError: documents that were durable are damaged.
        OSError: the disk refuses.
    """
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        if not path.name.removeprefix(_PREFIX).isdecimal():
            continue
        number = int(path.name.removeprefix(_PREFIX))
        # A whole frame may have been written but not synced when its writer died, and is about to be named.
        with path.open("r+b") as opened:
            os.fsync(opened.fileno())
            data = opened.read()
        file = RecentFile(path, number, {}, 0)
        for end, documents in _frames(data):
            file.documents.update((document.key, document) for document in documents)
            file.size = end
        if file.size < claimed.get(number, 0):
            raise _damaged(path, file.size)
        if file.size:
            found.append(file)
        else:
            path.unlink()
    return sorted(found, key=lambda file: file.number)


class RecentFiles:
    """What a reader has read of the files of a folder. Serves one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[int, tuple[int, Mapping[str, Recent]]] = {}

    def read(self) -> tuple[FreshnessRecord | None, Mapping[str, Recent]]:
        """The newest record, `None` before the first flush, and the newest document of each key that is recent in it.

        Read before tantivy's index is: that has whatever left these files.

        Raises:
            IndexLayoutError: documents are damaged.
        """
        missing: FreshnessRecord | None = None
        while (record := FreshnessRecord.load(self._folder)) is not None:
            try:
                # After a power cut an older record may name a file that went; tantivy has what was in it.
                return record, self._newest(record, is_lenient=record == missing)
            except FileNotFoundError:
                # It went after the record was read, which a newer one tells.
                missing = record
        return None, {}

    def _newest(self, record: FreshnessRecord, *, is_lenient: bool) -> Mapping[str, Recent]:
        read: dict[int, tuple[int, Mapping[str, Recent]]] = {}
        newest: dict[str, Recent] = {}
        for number, size in record.recent:
            with suppress(*[FileNotFoundError] if is_lenient else []):
                read[number] = self._at(number, size)
                newest.update(read[number][1])
        self._read = read
        return newest

    def _at(self, number: int, size: int) -> tuple[int, Mapping[str, Recent]]:
        start, known = self._read.get(number, (0, {}))
        if start == size:
            return start, known
        path = self._folder / f"{_PREFIX}{number}"
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size - start)
        documents, end = dict(known), 0
        for end, frame in _frames(data):  # noqa: B007
            documents.update((document.key, document) for document in frame)
        if end != size - start:
            raise _damaged(path, start + end)
        return size, documents


def _frames(data: bytes) -> Iterator[tuple[int, list[Recent]]]:
    """The whole frames at the beginning of the data, and where each ends."""
    start = 0
    while start + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, start)
        start += _HEAD.size
        payload = memoryview(data)[start : start + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        start += length
        yield start, _decoder.decode(payload)


def _damaged(path: Path, start: int) -> IndexLayoutError:
    return IndexLayoutError(
        f"cannot use the search index {str(path.parent)!r}: {path.name!r} is damaged from byte {start:,} on; "
        f"{how_to_rebuild(path.parent)}"
    )
