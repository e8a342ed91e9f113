"""A sealed segment: the frames of a closed one, unchanged, compressed, with an index of its groups.

    "DWLS" format │ block │ block │ … │ groups │ blocks │ trailer

A block is one zstd frame of some whole frames of the segment, about 4 MB of them, so any group is read by
decompressing one block. `groups` and `blocks` are Arrow IPC streams, which say where a group and a block begins in
the segment as it was appended. The trailer is found from the file's end; every part but the first eight bytes has its
checksum. A newer format ends with another magic, so a whole trailer of this one says of another number at the beginning
that it is damaged:

    trailer   groups at   length   crc32   blocks at   length   crc32   plain bytes   crc32 of these   "DWLS"
              u64         u64      u32     u64         u64      u32     u64           u32              4s
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from isal.isal_zlib import crc32

from deltaworks.log.change_log import GroupHeader, LogFormatError
from deltaworks.log.segment import BadFrameError, Frame

MAGIC = b"DWLS"
FORMAT = 1
BLOCK_BYTES = 4 << 20
"""Where a block ends, at the next whole frame; what reading one group alone has to decompress."""

_HEAD = struct.Struct("<4sI")
_TRAILER = struct.Struct("<QQIQQIQ")
_TRAILER_END = struct.Struct("<I4s")
_TIME = pa.timestamp("us", "UTC")

GROUPS = pa.schema(
    [
        ("sequence", pa.uint64()),
        ("offset", pa.uint64()),
        ("next_offset", pa.uint64()),
        ("position", pa.uint64()),
        ("is_partial", pa.bool_()),
        ("max_committed_at", _TIME),
        ("appended_at", _TIME),
        ("start", pa.uint64()),
    ]
)
BLOCKS = pa.schema(
    [("start", pa.uint64()), ("bytes", pa.uint64()), ("at", pa.uint64()), ("length", pa.uint64()), ("crc", pa.uint32())]
)


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    bytes: int
    at: int
    length: int
    crc: int


class SealedBytes:
    """The bytes of a sealed segment as they were appended. Keeps one block decompressed; only `load` is thread-safe."""

    checks_itself = True
    """A block's checksum is of what is stored; sealing compared what comes out of it with the plain segment."""

    def __init__(self, descriptor: int, *, is_salvage: bool = False) -> None:
        """Read what says where everything is; the descriptor is somebody else's to close.

        With `is_salvage` a whole trailer is enough.

        Raises:
            BadFrameError: the file is cut short or damaged there.
            LogFormatError: a newer version wrote it.
        """
        self.descriptor = descriptor
        self.file_bytes = os.fstat(descriptor).st_size
        (groups_at, groups_length, groups_crc, at, length, crc, self.size) = _trailer(
            descriptor, self.file_bytes, is_salvage=is_salvage
        )
        self._groups = (groups_at, groups_length, groups_crc)
        rows = _table(descriptor, at, length, crc).to_pylist()
        self._blocks = [_Block(**row) for row in rows]
        self._starts = [block.start for block in self._blocks]
        self._held: tuple[_Block, memoryview] | None = None

    def groups(self) -> pa.Table:
        """The index: a row of `GROUPS` for each group, in order.

        Raises:
            BadFrameError: it fails its checksum.
        """
        return _table(self.descriptor, *self._groups)

    def stored_blocks(self) -> Iterator[bytes]:
        """The blocks as they are stored, in order and not checked: for whoever saves what is left of them."""
        return (os.pread(self.descriptor, block.length, block.at) for block in self._blocks)

    def read(self, start: int, length: int) -> memoryview:
        """See `FrameBytes`."""
        if start >= self.size:
            return memoryview(b"")
        block, content = self._block_with(start)
        at = start - block.start
        return content[at : at + length]

    def load(self, start: int, end: int) -> pa.Buffer:
        """See `FrameBytes`."""
        block = self._block_at(start)
        at = start - block.start
        return self._decompressed(block).slice(at, end - start)

    def block_end(self, start: int) -> int:
        """Where the block ends that has the byte at `start`: the end of a frame."""
        block = self._block_at(start)
        return block.start + block.bytes

    def _block_at(self, start: int) -> _Block:
        return self._blocks[bisect_right(self._starts, start) - 1]

    def _block_with(self, start: int) -> tuple[_Block, memoryview]:
        block = self._block_at(start)
        if self._held is None or self._held[0] is not block:
            self._held = block, memoryview(self._decompressed(block)).cast("B")
        return self._held

    def _decompressed(self, block: _Block) -> pa.Buffer:
        stored = os.pread(self.descriptor, block.length, block.at)
        if len(stored) < block.length or crc32(stored) != block.crc:
            raise BadFrameError(f"its block at byte {block.at} fails its checksum")
        try:
            return pa.Codec("zstd").decompress(stored, block.bytes)
        except (OSError, pa.ArrowException) as error:
            raise BadFrameError(f"its block at byte {block.at} cannot be decompressed") from error


class SealedWriter:
    """Writes a sealed segment into an empty file, frame by frame; durable only after whoever owns the file syncs it."""

    def __init__(self, descriptor: int, *, level: int) -> None:
        self._descriptor = descriptor
        self._codec = pa.Codec("zstd", compression_level=level)
        self._at = 0
        self._groups: list[tuple[object, ...]] = []
        self._blocks: list[tuple[int, int, int, int, int]] = []
        self._frames: list[bytes] = []
        self._start = self._size = 0
        self._write(_HEAD.pack(MAGIC, FORMAT))

    def add(self, frame: Frame, header: GroupHeader, content: bytes) -> None:
        """Take the next frame as it stands in the plain segment."""
        place = (header.sequence, header.offset, header.next_offset, header.position.value, header.is_partial)
        self._groups.append((*place, header.max_committed_at, header.appended_at, frame.start))
        self._frames.append(content)
        self._size += len(content)
        if self._size >= BLOCK_BYTES:
            self._end_block()

    def finish(self) -> None:
        """Write what says where everything is."""
        self._end_block()
        places = self._write_index(self._groups, GROUPS), self._write_index(self._blocks, BLOCKS)
        trailer = _TRAILER.pack(*places[0], *places[1], self._start)
        self._write(trailer + _TRAILER_END.pack(crc32(trailer), MAGIC))

    def _end_block(self) -> None:
        if not self._frames:
            return
        plain = b"".join(self._frames)
        stored = self._codec.compress(plain, asbytes=True)
        self._blocks.append((self._start, len(plain), self._at, len(stored), crc32(stored)))
        self._write(stored)
        self._start += len(plain)
        self._frames, self._size = [], 0

    def _write_index(
        self, rows: list[tuple[object, ...]] | list[tuple[int, int, int, int, int]], schema: pa.Schema
    ) -> tuple[int, int, int]:
        columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
        arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        content = sink.getvalue().to_pybytes()
        at = self._at
        self._write(content)
        return at, len(content), crc32(content)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._at += len(content)


def plain_size(path: Path) -> int:
    """How many bytes a sealed segment had before.

    Raises:
        BadFrameError: the file is cut short or damaged at its end.
        FileNotFoundError: it is not there any more.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _trailer(descriptor, os.fstat(descriptor).st_size)[-1]
    finally:
        os.close(descriptor)


def _trailer(descriptor: int, size: int, *, is_salvage: bool = False) -> tuple[int, int, int, int, int, int, int]:
    length = _TRAILER.size + _TRAILER_END.size
    trailer = os.pread(descriptor, length, max(0, size - length))
    ends_as_known = len(trailer) == length and _TRAILER_END.unpack_from(trailer, _TRAILER.size) == (
        crc32(trailer[: _TRAILER.size]),
        MAGIC,
    )
    if not (is_salvage and ends_as_known):
        _check_head(os.pread(descriptor, _HEAD.size, 0), ends_as_known=ends_as_known)
    if len(trailer) < length:
        raise BadFrameError("it is cut short")
    if not ends_as_known:
        raise BadFrameError("its trailer fails its checksum")
    groups_at, groups_length, groups_crc, at, blocks_length, blocks_crc, plain = _TRAILER.unpack_from(trailer)
    return groups_at, groups_length, groups_crc, at, blocks_length, blocks_crc, plain


def _check_head(head: bytes, *, ends_as_known: bool) -> None:
    if len(head) < _HEAD.size or head[:4] != MAGIC:
        raise BadFrameError("it does not begin as a sealed segment does")
    version = _HEAD.unpack(head)[1]
    if version != FORMAT and ends_as_known:
        raise BadFrameError(f"it ends as one of format {FORMAT}, and its first bytes say {version!r}")
    if version != FORMAT:
        raise LogFormatError(
            f"cannot read sealed segments of format {version!r}; this version reads {FORMAT}: upgrade Deltaworks"
        )


def _table(descriptor: int, at: int, length: int, crc: int) -> pa.Table:
    content = os.pread(descriptor, length, at)
    if len(content) < length or crc32(content) != crc:
        raise BadFrameError(f"its index at byte {at} fails its checksum")
    with pa.ipc.open_stream(content) as stream:
        return stream.read_all()
