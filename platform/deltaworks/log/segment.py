"""The file format of the local log: a segment is a run of frames, one frame is one group.

    frame    magic   crc32 of   format  length of  crc32 of  length of
             "DWLG"  the rest           the JSON   the body  the body
             4s      u32        u32     u32        u32       u64        JSON   body

`crc32 of the rest` covers the fixed fields after it and the JSON, so a header can be trusted
without reading the body. The fixed fields never change their layout; `format` says how to read
what follows them. The JSON is the group's header plus the length of each stream; the body is one
Arrow IPC stream per batch, each with its schema and its metadata. Numbers are little-endian. The JSON
ends with spaces, so that every body begins at a multiple of 8 as Arrow likes it; older ones do not.

Format 2 is a named gap: a group whose changes are lost, see `mending`. It has no streams, and a number of its own so
that a version which does not know gaps stops at it.

A segment is named by the sequence of its first group. While it grows it needs no index; once it is closed it is
sealed, see `sealed`: the same frames, compressed.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
from isal.isal_zlib import crc32

from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import GroupHeader, LogFormatError, StoredGroup
from deltaworks.log.header import decode_header, encode_header
from deltaworks.schema import TableSchema

MAGIC = b"DWLG"
FORMAT = 1
GAP_FORMAT = 2

_FIXED = struct.Struct("<4sIIIIQ")
_CHECKED = struct.Struct("<IIIQ")
_ALIGNMENT = 8
_CONTINUES = b"\xff\xff\xff\xff"
_HEAD_BYTES = 4096
"""Read at once: the fixed fields and, nearly always, the whole JSON."""


class FrameBytes(Protocol):
    """The bytes of a segment as they were appended, whatever keeps them. Raises `BadFrameError` for damaged ones."""

    checks_itself: bool
    """Whether `load` compares all that it gives with a checksum, so that those of the frames need not be."""

    @property
    def size(self) -> int:
        """How many there are as of now."""

    def read(self, start: int, length: int) -> bytes | memoryview:
        """At most so many bytes from `start`; none at the end. What is one frame is never given in pieces."""

    def load(self, start: int, end: int) -> pa.Buffer:
        """The bytes from `start` to `end`, or to where they end; both within one block where there are blocks.

        Any number of threads may do it at once: it uses nothing but the file, and lets others run meanwhile.
        """


class PlainBytes:
    """The bytes of a file that may grow; its descriptor is somebody else's to close."""

    checks_itself = False

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        """See `FrameBytes`."""
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, length: int) -> bytes:
        """See `FrameBytes`."""
        return os.pread(self.descriptor, length, start)

    def load(self, start: int, end: int) -> pa.Buffer:
        """See `FrameBytes`."""
        # Arrow allocates on 64 bytes, as its kernels like their buffers; a `bytes` object is not aligned so.
        content = pa.allocate_buffer(end - start)
        view, done = memoryview(content), 0
        while done < len(view) and (count := os.preadv(self.descriptor, [view[done:]], start + done)):
            done += count
        return content if done == len(view) else content.slice(0, done)


class BadFrameError(Exception):
    """The bytes at a place are not a whole frame. Whoever knows the log decides what that means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame whose header is whole; its body has not been read."""

    start: int
    head: bytes
    body_length: int
    body_crc: int

    @property
    def body_start(self) -> int:
        """Where the body begins."""
        return self.start + _FIXED.size + len(self.head)

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.body_start + self.body_length

    def header(self) -> GroupHeader:
        """The group's header."""
        return decode_header(self.head, "streams")[0]


def encode_frame(header: GroupHeader, batches: tuple[ChangeBatch, ...]) -> tuple[bytes, pa.Buffer]:
    """A group as the two buffers of its frame: head and body."""
    sink = pa.BufferOutputStream()
    lengths: list[int] = []
    for batch in batches:
        start = sink.tell()
        with pa.ipc.new_stream(sink, batch.rows.schema) as stream:
            stream.write_batch(batch.rows)
        lengths.append(sink.tell() - start)
    body = sink.getvalue()
    text = encode_header(header, streams=lengths)
    # Frames follow one another, and Arrow's streams are multiples of it.
    text += b" " * (-(_FIXED.size + len(text)) % _ALIGNMENT)
    version = FORMAT if header.lost is None else GAP_FORMAT
    checked = _CHECKED.pack(version, len(text), crc32(body), body.size)
    crc = crc32(text, crc32(checked))
    return MAGIC + crc.to_bytes(4, "little") + checked + text, body


def encode_head(header: GroupHeader) -> bytes:
    """The head of a frame without a body, from which the group's header can be read."""
    return encode_frame(header, ())[0]


def read_frame(source: FrameBytes, start: int) -> Frame | None:
    """The frame at `start`, or `None` at the end of the file.

    Raises:
        BadFrameError: the frame is cut short or its header fails the checksum.
        LogFormatError: a whole header of a format this version does not know.
    """
    frame = read_head(source, start)
    if frame is not None and frame.end > source.size:
        raise BadFrameError("the frame is cut short")
    return frame


def read_head(source: FrameBytes, start: int) -> Frame | None:
    """The frame at `start` by its header alone, whose body may be cut short; raises like `read_frame`."""
    head = source.read(start, _HEAD_BYTES)
    if not head:
        return None
    if len(head) < _FIXED.size:
        raise BadFrameError("the frame is cut short")
    magic, crc, version, text_length, body_crc, body_length = _FIXED.unpack_from(head)
    if magic != MAGIC:
        raise BadFrameError("there is no frame")
    if start + _FIXED.size + text_length > source.size:
        raise BadFrameError("the frame is cut short")
    text = head[_FIXED.size : _FIXED.size + text_length]
    if len(text) < text_length:
        text = source.read(start + _FIXED.size, text_length)
    if crc32(text, crc32(head[8 : _FIXED.size])) != crc:
        raise BadFrameError("the header fails its checksum")
    if version not in (FORMAT, GAP_FORMAT):
        raise LogFormatError(
            f"cannot read log format {version!r} at byte {start}; this version reads {FORMAT} and {GAP_FORMAT}: "
            "upgrade Deltaworks"
        )
    return Frame(start=start, head=bytes(text), body_length=body_length, body_crc=body_crc)


def frames(source: FrameBytes, start: int = 0) -> Iterator[Frame]:
    """The frames from `start` to the end of the file; raises like `read_frame`."""
    while (frame := read_frame(source, start)) is not None:
        yield frame
        start = frame.end


def frame_end(source: FrameBytes, start: int) -> int | None:
    """Where the frame at `start` says that it ends, unchecked; `None` where it does not say so."""
    head = source.read(start, _FIXED.size)
    if len(head) < _FIXED.size:
        return None
    magic, _, _, text_length, _, body_length = _FIXED.unpack(head)
    end: int = start + _FIXED.size + text_length + body_length
    return end if magic == MAGIC else None


def read_body(source: FrameBytes, frame: Frame) -> pa.Buffer:
    """The body of a frame, checked.

    Raises:
        BadFrameError: it fails its checksum.
    """
    return _checked(source.load(frame.body_start, frame.end), frame)


class LoadedBytes:
    """A part of a segment in memory, at the places that it has in the segment; as sound as what it was loaded from."""

    checks_itself = False

    def __init__(self, content: pa.Buffer, *, start: int) -> None:
        self.size = start + content.size
        self._content = content
        self._view = memoryview(content)
        self._start = start

    def read(self, start: int, length: int) -> memoryview:
        """See `FrameBytes`."""
        at = start - self._start
        return self._view[at : at + length]

    def load(self, start: int, end: int) -> pa.Buffer:
        """See `FrameBytes`."""
        at = start - self._start
        content = self._content.slice(at, min(end, self.size) - start)
        if content.address % _ALIGNMENT == 0:
            return content
        aligned = pa.allocate_buffer(content.size)
        memoryview(aligned)[:] = memoryview(content)
        return aligned


class Schemas:
    """The schemas that were met in streams, each parsed once. Any number of threads may share it."""

    _MOST = 1_000

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[pa.Schema, TableSchema]] = {}

    def batch(self, content: pa.Buffer) -> ChangeBatch:
        """The one batch of a stream."""
        # A stream begins with the schema's message: four bytes of ones, its length, itself. The batch's follows.
        begin = (
            len(_CONTINUES) + 4 + int.from_bytes(memoryview(content)[len(_CONTINUES) : len(_CONTINUES) + 4], "little")
        )
        key = content.slice(0, begin).to_pybytes()
        if (known := self._known.get(key)) is not None:
            schema, table = known
            return ChangeBatch(table, pa.ipc.read_record_batch(content.slice(begin), schema))
        with pa.ipc.open_stream(content) as opened:
            rows = opened.read_next_batch()
        batch = ChangeBatch.from_arrow(rows)
        # A batch of an older version is brought to the columns of now, each one by itself.
        is_as_now = key.startswith(_CONTINUES) and batch.rows is rows
        if is_as_now and not any(pa.types.is_dictionary(kind) for kind in rows.schema.types):
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = rows.schema, batch.schema
        return batch


def decode_frame(frame: Frame, body: pa.Buffer, schemas: Schemas | None = None) -> StoredGroup:
    """The group of a frame whose body was checked."""
    header, rest = decode_header(frame.head, "streams")
    schemas = schemas or Schemas()
    batches: list[ChangeBatch] = []
    start = 0
    for length in rest["streams"]:
        batches.append(schemas.batch(body.slice(start, length)))
        start += length
    return StoredGroup(header, tuple(batches))


def _checked(body: pa.Buffer, frame: Frame) -> pa.Buffer:
    if body.size < frame.body_length:
        raise BadFrameError("the body is cut short")
    if crc32(body) != frame.body_crc:
        raise BadFrameError("the body fails its checksum")
    return body


def holds_frame_after(source: FrameBytes, start: int) -> bool:
    """Whether a whole frame header lies anywhere after `start`.

    A group is written only after the one before it is durable. So a broken frame with a whole one
    behind it was whole once, and is damage, never the trace of a crash.
    """
    tail = bytes(source.read(start, source.size - start))
    at = tail.find(MAGIC, 1)
    while at >= 0:
        try:
            if read_frame(source, start + at) is not None:
                return True
        except (BadFrameError, LogFormatError):
            pass
        at = tail.find(MAGIC, at + 1)
    return False
