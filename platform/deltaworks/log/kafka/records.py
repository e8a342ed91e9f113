"""How a group becomes Kafka records and is put together again: pure functions.

    changes  value    an Arrow IPC stream with the rows of one table whose key belongs to the partition; `_row` is
                      their place in the group's batch, left out where a batch lies in one partition as a whole
             headers  table, sequence, batch, part (`1/1`; a stream larger than a record is cut in parts), epoch,
                      dense (counts the partition's records from 0, without a hole)
    groups   value    the group's header as JSON, `pieces`: [batch, partition, offset, …] for every stream, and
                      `counts`: the next `dense` of every partition
             headers  kind (`group`, or `epoch` where a writer opened the log), log (its identity), format

All changes of a key lie in one partition in the source's order; a truncate and tables without a key go to one of the
table's own. A group holds whole source transactions (or is partial), so whoever reads several partitions has a
transaction whole once it has the offsets that its group's record names.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from deltaworks.capture.proof import key_hashes
from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import CorruptLogError, GroupHeader, LogFormatError
from deltaworks.log.header import decode_header, encode_header

FORMAT = 1
ROW = pa.field("_row", pa.uint32(), nullable=False)

GROUP, EPOCH = b"group", b"epoch"

Headers = list[tuple[str, str | bytes | None]]
Found = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of one batch that belong to one partition, as the bytes of an Arrow IPC stream."""

    batch: int
    partition: int
    table: str
    stream: memoryview

    def parts(self, max_bytes: int) -> list[memoryview]:
        """The stream in parts that fit a record."""
        return [self.stream[at : at + max_bytes] for at in range(0, len(self.stream), max_bytes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """A record of the topic of groups. `header` is `None` where a writer opened the log."""

    log: str
    epoch: int
    header: GroupHeader | None
    pieces: Sequence[Sequence[int]]
    counts: Sequence[int]
    offset: int


def pieces_of(batches: Sequence[ChangeBatch], *, partitions: int) -> Iterator[Piece]:
    """Every batch, split by partition."""
    for number, batch in enumerate(batches):
        table = str(batch.schema.name)
        places = partition_of(batch, partitions=partitions)
        used = np.unique(places).tolist()
        if len(used) == 1:
            yield Piece(number, used[0], table, _stream(batch.rows))
            continue
        for partition in used:
            rows = np.flatnonzero(places == partition).astype(np.uint32)
            taken = batch.rows.take(pa.array(rows))
            arrays = [*taken.columns, pa.array(rows)]
            schema = batch.rows.schema.append(ROW)
            yield Piece(number, partition, table, _stream(pa.RecordBatch.from_arrays(arrays, schema=schema)))


def partition_of(batch: ChangeBatch, *, partitions: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """The partition of every change, by table and key."""
    seed = np.uint64(zlib.crc32(str(batch.schema.name).encode()))
    hashes = key_hashes(batch)
    # The low bits of a sum of hashes alone would put small integer keys side by side.
    return ((hashes ^ (hashes >> np.uint64(29))) + seed) % np.uint64(partitions)


def put_together(streams: Mapping[int, Sequence[bytes]]) -> tuple[ChangeBatch, ...]:
    """The batches of a group out of the streams of each, in order."""
    return tuple(ChangeBatch.from_arrow(_merged([_rows(stream) for stream in streams[at]])) for at in sorted(streams))


def data_headers(piece: Piece, *, sequence: int, part: int, of: int, epoch: int, dense: int) -> Headers:
    """What stands beside a record of changes."""
    return [
        ("table", piece.table.encode()),
        ("sequence", b"%d" % sequence),
        ("batch", b"%d" % piece.batch),
        ("part", b"%d/%d" % (part + 1, of)),
        ("epoch", b"%d" % epoch),
        ("dense", b"%d" % dense),
    ]


def encode_group(header: GroupHeader, *, pieces: Sequence[Sequence[int]], counts: Sequence[int]) -> bytes:
    """The record that makes a group visible."""
    return encode_header(header, pieces=pieces, counts=counts)


def encode_epoch(*, epoch: int, counts: Sequence[int], topics: Mapping[str, str]) -> bytes:
    """The record of a writer that opened the log; `topics` are the ids that the topics had."""
    return json.dumps({"epoch": epoch, "counts": counts, "topics": topics}).encode()


def decode_record(value: bytes, headers: Found, *, offset: int, where: str) -> GroupRecord:
    """Read a record of the topic of groups.

    Raises:
        LogFormatError: something else wrote it, or a newer version.
    """
    given = dict(headers)
    if given.get("kind") not in (GROUP, EPOCH) or int(given.get("format", b"0")) != FORMAT:
        raise LogFormatError(
            f"cannot read {where} at offset {offset}: it is no record of a change log of format {FORMAT}; "
            "upgrade Deltaworks, or give the log topics of its own"
        )
    log = given["log"].decode()
    if given["kind"] == EPOCH:
        values = json.loads(value)
        return GroupRecord(
            log=log, epoch=values["epoch"], header=None, pieces=(), counts=values["counts"], offset=offset
        )
    header, rest = decode_header(value, "pieces", "counts")
    return GroupRecord(
        log=log, epoch=header.epoch, header=header, pieces=rest["pieces"], counts=rest["counts"], offset=offset
    )


def check_data(headers: Found, *, sequence: int, batch: int, where: str) -> None:
    """Check that a record is the one that its group names.

    Raises:
        CorruptLogError: it belongs to another group.
    """
    given = dict(headers)
    if (given.get("sequence"), given.get("batch")) != (b"%d" % sequence, b"%d" % batch):
        raise CorruptLogError(
            f"cannot read {where}: expected changes of group {sequence}, found group "
            f"{given.get('sequence', b'none').decode()}; the topic was made anew or written by something else: "
            "remove both topics and dump the source again"
        )


def record_headers(kind: bytes, log: str) -> Headers:
    """What stands beside a record of the topic of groups."""
    return [("kind", kind), ("log", log.encode()), ("format", b"%d" % FORMAT)]


def _stream(rows: pa.RecordBatch) -> memoryview:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    return memoryview(sink.getvalue())


def _rows(stream: bytes) -> pa.RecordBatch:
    # Arrow's kernels like their buffers on 64 bytes, which a `bytes` object is not.
    buffer = pa.allocate_buffer(len(stream))
    memoryview(buffer).cast("B")[:] = stream
    with pa.ipc.open_stream(buffer) as reader:
        return reader.read_next_batch()


def _merged(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(parts) == 1 and ROW.name not in parts[0].schema.names:
        return parts[0]
    together = pa.concat_batches(parts)
    at = together.schema.names.index(ROW.name)
    order = np.argsort(together.column(at).to_numpy())
    schema = together.schema.remove(at)
    return pa.RecordBatch.from_arrays([column.take(pa.array(order)) for column in together.columns[:at]], schema=schema)
