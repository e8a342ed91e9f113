"""The file format of the local log: a segment is a run of frames, one frame is one group.

    frame    magic   crc32 of   format  length of  crc32 of  length of
             "DWLG"  the rest           the JSON   the body  the body
             4s      u32        u32     u32        u32       u64        JSON   body

`crc32 of the rest` covers the fixed fields after it and the JSON, so a header can be trusted
without reading the body. The fixed fields never change their layout; `format` says how to read
what follows them. The JSON is the group's header plus the length of each stream; the body is one
Arrow IPC stream per batch, each with its schema and its metadata. Numbers are little-endian.

A segment is named by the sequence of its first group. While it grows it needs no index; once it is closed it is
sealed, see `sealed`: the same frames, compressed.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import GroupHeader, LogFormatError, StoredGroup
from deltaworks.log.header import decode_header, encode_header

MAGIC = b"DWLG"
FORMAT = 1

_FIXED = struct.Struct("<4sIIIIQ")
_CHECKED = struct.Struct("<IIIQ")
_HEAD_BYTES = 4096
"""Read at once: the fixed fields and, nearly always, the whole JSON."""


class FrameBytes(Protocol):
    """The bytes of a segment as they were appended, whatever keeps them. Raises `BadFrameError` for damaged ones."""

    @property
    def size(self) -> int:
        """How many there are as of now."""

    def read(self, start: int, length: int) -> bytes | memoryview:
        """At most so many bytes from `start`; none at the end. What is one frame is never given in pieces."""

    def read_into(self, view: memoryview, start: int) -> int:
        """Fill a view with the bytes from `start`, as far as they go; how many those were."""


class PlainBytes:
    """The bytes of a file that may grow; its descriptor is somebody else's to close."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size(self) -> int:
        """See `FrameBytes`."""
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, length: int) -> bytes:
        """See `FrameBytes`."""
        return os.pread(self.descriptor, length, start)

    def read_into(self, view: memoryview, start: int) -> int:
        """See `FrameBytes`."""
        done = 0
        while done < len(view) and (count := os.preadv(self.descriptor, [view[done:]], start + done)):
            done += count
        return done


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
    checked = _CHECKED.pack(FORMAT, len(text), zlib.crc32(body), body.size)
    crc = zlib.crc32(text, zlib.crc32(checked))
    return MAGIC + crc.to_bytes(4, "little") + checked + text, body


def read_frame(source: FrameBytes, start: int) -> Frame | None:
    """The frame at `start`, or `None` at the end of the file.

    Raises:
        BadFrameError: the frame is cut short or its header fails the checksum.
        LogFormatError: a whole header of a format this version does not know.
    """
    head = source.read(start, _HEAD_BYTES)
    if not head:
        return None
    if len(head) < _FIXED.size:
        raise BadFrameError("the frame is cut short")
    magic, crc, version, text_length, body_crc, body_length = _FIXED.unpack_from(head)
    if magic != MAGIC:
        raise BadFrameError("there is no frame")
    if start + _FIXED.size + text_length + body_length > source.size:
        raise BadFrameError("the frame is cut short")
    text = head[_FIXED.size : _FIXED.size + text_length]
    if len(text) < text_length:
        text = source.read(start + _FIXED.size, text_length)
    if zlib.crc32(text, zlib.crc32(head[8 : _FIXED.size])) != crc:
        raise BadFrameError("the header fails its checksum")
    if version != FORMAT:
        raise LogFormatError(
            f"cannot read log format {version!r} at byte {start}; this version reads {FORMAT}: upgrade Deltaworks"
        )
    return Frame(start=start, head=bytes(text), body_length=body_length, body_crc=body_crc)


def frames(source: FrameBytes, start: int = 0) -> Iterator[Frame]:
    """The frames from `start` to the end of the file; raises like `read_frame`."""
    while (frame := read_frame(source, start)) is not None:
        yield frame
        start = frame.end


def read_body(source: FrameBytes, frame: Frame) -> pa.Buffer:
    """The body of a frame, checked.

    Raises:
        BadFrameError: it fails its checksum.
    """
    # Arrow allocates on 64 bytes, as its kernels like their buffers; a `bytes` object is not aligned so.
    body = pa.allocate_buffer(frame.body_length)
    if source.read_into(memoryview(body), frame.body_start) < frame.body_length:
        raise BadFrameError("the body is cut short")
    if zlib.crc32(body) != frame.body_crc:
        raise BadFrameError("the body fails its checksum")
    return body


def decode_frame(frame: Frame, body: pa.Buffer) -> StoredGroup:
    """The group of a frame whose body was checked."""
    header, rest = decode_header(frame.head, "streams")
    batches: list[ChangeBatch] = []
    start = 0
    for length in rest["streams"]:
        with pa.ipc.open_stream(body.slice(start, length)) as stream:
            batches.append(ChangeBatch.from_arrow(stream.read_next_batch()))
        start += length
    return StoredGroup(header, tuple(batches))


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
