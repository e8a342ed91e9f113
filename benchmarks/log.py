"""The local log beside a bare write and fdatasync, and beside capture: append, replay, and opening many segments.

Appends and bare writes of the same number of bytes take turns, one by one, on the same disk. The changes of the
sustained append are narrow rows that capture took from PostgreSQL in this run, in the groups it made of them. Replays
of plain and of sealed segments take turns too, right after the append that they are compared with; where the machine
is not quiet, compare CPU seconds. Replay is bounded by the checksum, which is printed alone beside it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from capture import SETTINGS as SERVER_SETTINGS
from capture import drained_by_us, end_of_wal, make_changes
from isal.isal_zlib import crc32
from measure import Figure, report

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import LocalLogConfig
from deltaworks.log.change_log import EMPTY_END, Group, StoredGroup
from deltaworks.log.header import end_after, next_header
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment import encode_frame
from deltaworks.log.segment_file import segment_name, usage
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.testing.postgres import PostgresServer

NARROW = TableSchema(
    name=TableName("public", "narrow"),
    columns=(
        Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),
        Column(name="n", type=pa.int32(), source_type="integer"),
        Column(name="v", type=pa.string(), source_type="text"),
        Column(name="at", type=pa.timestamp("us", "UTC"), source_type="timestamp with time zone"),
    ),
    key=("id",),
)
GROUP_ROWS = 560
"""Rows of a group of 55 kB, headers included."""
SEGMENTS = 10_000
KEEPS_UP, REPLAY_TIMES = 1.0, 5.0
REPLAYS = 5
TIMES = 8
"""How often what was captured is appended: a log of a gigabyte, of which the start of a replay is a small part."""
"""Replays of each kind in a turn."""


def batch(rows: int) -> ChangeBatch:
    """Narrow rows as capture makes them."""
    nothing = pa.nulls(rows)
    schema = change_schema(NARROW)
    columns = {
        "_op": pa.repeat(pa.scalar("c"), rows),
        "_commit": pa.array(np.full(rows, 7), pa.uint64()),
        "_ordinal": pa.array(np.arange(rows), pa.uint32()),
        "_txid": pa.array(np.full(rows, 9), pa.uint64()),
        "_committed_at": pa.array(np.full(rows, 1_700_000_000_000_000), pa.timestamp("us", "UTC")),
        "id": pa.array(np.arange(rows), pa.int64()),
        "n": pa.array(np.arange(rows) % 1000, pa.int32()),
        "v": pa.array([f"value {number}" for number in range(rows)]),
        "at": pa.array(np.full(rows, 1_700_000_000_000_000), pa.timestamp("us", "UTC")),
    }
    arrays = [columns.get(field.name, nothing).cast(field.type) for field in schema]
    return ChangeBatch(NARROW, pa.RecordBatch.from_arrays(arrays, schema=schema))


def append(writer: LocalLogWriter, batches: tuple[ChangeBatch, ...]) -> None:
    """Append one group at the log's end."""
    end = writer.end()
    writer.append(Group(batches=batches, position=Lsn(end.position.value + 1), previous_position=end.position))


def append_beside_bare(folder: Path, *, groups: int) -> tuple[float, float, int]:
    """Milliseconds of an append and of a bare write with fdatasync of as many bytes, medians; and the bytes."""
    changes = batch(GROUP_ROWS)
    ours: list[float] = []
    bare: list[float] = []
    descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT)
    with LocalLogWriter.open(folder / "log") as writer:
        append(writer, (changes,))
        size = (folder / "log" / segment_name(0)).stat().st_size
        payload = os.urandom(size)
        for _ in range(groups):
            began = time.perf_counter()
            append(writer, (changes,))
            between = time.perf_counter()
            os.write(descriptor, payload)
            os.fdatasync(descriptor)
            ours.append(between - began)
            bare.append(time.perf_counter() - between)
    os.close(descriptor)
    return statistics.median(ours) * 1000, statistics.median(bare) * 1000, size


def captured(folder: Path, *, changes: int) -> tuple[Path, list[float]]:
    """A log of narrow rows that capture made, and its rates into Arrow, in changes a second, three times."""
    with PostgresServer.start(folder / "server", settings=SERVER_SETTINGS) as server:
        make_changes(server, narrow=changes, wide=10)
        end = end_of_wal(server)
        runs = [drained_by_us(server, "narrow", end) for _ in range(3)]
        drained_by_us(server, "narrow", end, log=folder / "captured")
    return folder / "captured", [run["changes"] / run["wall_s"] for run in runs]


@dataclass(frozen=True, slots=True)
class Rate:
    """Changes a second, by the clock and by the CPU time of all threads."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], int]) -> Self:
        """The rate at which it does as many changes as it says."""
        began, began_cpu = time.perf_counter(), time.process_time()
        changes = work()
        return cls(changes / (time.perf_counter() - began), changes / (time.process_time() - began_cpu))


def middle(rates: Sequence[Rate]) -> Rate:
    """The medians."""
    return Rate(statistics.median(rate.wall for rate in rates), statistics.median(rate.cpu for rate in rates))


def append_again(groups: Sequence[StoredGroup], folder: Path) -> int:
    """Append these groups to a new log, each durable before the next, and all of them `TIMES` times."""
    with LocalLogWriter.open(folder) as writer:
        for group in chain.from_iterable(repeat(groups, TIMES)):
            append(writer, group.batches)
        return writer.end().offset


def replay(folder: Path) -> int:
    """Read a log from its start, every checksum checked."""
    groups = LocalLogReader(folder).read(after_sequence=-1)
    return sum(len(batch) for group in groups for batch in group.batches)


def checksum(folder: Path) -> int:
    """Read the files of a log and check them in one thread, which no replay of plain ones can leave out."""
    for path in sorted(folder.glob("*.segment")):
        crc32(path.read_bytes())
    return LocalLogReader(folder).end().offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An append, and the replays after it."""

    append: Rate
    plain: Rate
    sealed: Rate
    checksum: Rate
    times_smaller: float


def turn(groups: Sequence[StoredGroup], folder: Path) -> Turn:
    """Append, then replay plain and sealed segments one after the other."""
    plain, sealed = folder / "plain", folder / "sealed"
    appended = Rate.of(lambda: append_again(groups, plain))
    shutil.copytree(plain, sealed)
    times_smaller = seal(sealed)
    rates: dict[str, list[Rate]] = {"plain": [], "sealed": [], "checksum": []}
    for _ in range(REPLAYS):
        rates["plain"].append(Rate.of(lambda: replay(plain)))
        rates["sealed"].append(Rate.of(lambda: replay(sealed)))
        rates["checksum"].append(Rate.of(lambda: checksum(plain)))
    shutil.rmtree(folder)
    found = {name: middle(each) for name, each in rates.items()}
    return Turn(append=appended, times_smaller=times_smaller, **found)


def seal(folder: Path) -> float:
    """Seal a whole log, its last segment too; how many times smaller it is then."""
    with LocalLogWriter.open(folder, segment_bytes=1) as writer:
        # Whatever is behind the last segment closes it.
        append(writer, ())
    seal_closed(folder, level=LocalLogConfig().seal_level)
    taken = usage(folder)
    return taken.plain_bytes / taken.bytes


def make_segments(folder: Path, count: int) -> None:
    """A log of so many segments with one group in each; not synced, which no opening can see."""
    folder.mkdir()
    end, changes = EMPTY_END, batch(3)
    for number in range(count):
        group = Group(batches=(changes,), position=Lsn(number + 1), previous_position=end.position)
        header = next_header(group, end=end, epoch=1, appended_at=datetime.now(UTC))
        (folder / segment_name(number)).write_bytes(b"".join(map(bytes, encode_frame(header, group.batches))))
        end = end_after(header)


def open_many(folder: Path) -> float:
    """Seconds to open a writer, and a reader that knows the end and reads a group in the middle."""
    began = time.perf_counter()
    with LocalLogWriter.open(folder) as writer:
        last = writer.end().sequence
        next(LocalLogReader(folder).read(after_sequence=last // 2))
    return time.perf_counter() - began


def main() -> int:
    """Print the figures; the number of goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--groups", type=int, default=400, help="appends of 55 kB in a repeat")
    parser.add_argument("--changes", type=int, default=1_000_000, help="narrow changes that capture takes")
    parser.add_argument("--json", type=Path, metavar="PATH")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaworks-log-") as name:
        folder = Path(name)
        # The server runs as an unprivileged user.
        folder.chmod(0o755)
        pairs = []
        for number in range(asked.repeats):
            (folder / f"pair-{number}").mkdir()
            pairs.append(append_beside_bare(folder / f"pair-{number}", groups=asked.groups))
        log, rates = captured(folder, changes=asked.changes)
        groups = list(LocalLogReader(log).read(after_sequence=-1))
        turns = [turn(groups, folder / f"again-{number}") for number in range(asked.repeats)]
        make_segments(folder / "many", SEGMENTS)
        opened = [open_many(folder / "many") for _ in range(asked.repeats)]
    return report("local log", [*figures(pairs, rates, turns, opened), *replay_figures(turns)], path=asked.json)


def figures(
    pairs: Sequence[tuple[float, float, int]], rates: Sequence[float], turns: Sequence[Turn], opened: Sequence[float]
) -> list[Figure]:
    """What was measured of appends and of opening, with the goals."""
    capture_rate = statistics.median(rates)
    return [
        Figure(
            name=f"write + fdatasync, {pairs[0][2] / 1000:.0f} kB", values=[bare for _, bare, _ in pairs], unit="ms"
        ),
        Figure(name="append, p50", values=[own for own, _, _ in pairs], unit="ms"),
        Figure(name="append ÷ write + fdatasync", values=[own / bare for own, bare, _ in pairs], unit="", goal=2.0),
        Figure(name="capture to Arrow, narrow", values=rates, unit="changes/s"),
        Figure(name="sustained append, narrow", values=[each.append.wall for each in turns], unit="changes/s"),
        Figure(
            name="append ÷ capture",
            values=[each.append.wall / capture_rate for each in turns],
            unit="",
            goal=KEEPS_UP,
            smaller_is_better=False,
        ),
        Figure(name=f"open {SEGMENTS:,} segments", values=opened, unit="s", goal=1.0),
    ]


def replay_figures(turns: Sequence[Turn]) -> list[Figure]:
    """What was measured of replays, of plain and of sealed segments."""
    found = [Figure(name="sealed: times smaller", values=[each.times_smaller for each in turns], unit="×")]
    for kind, rate in (("plain", lambda each: each.plain), ("sealed", lambda each: each.sealed)):
        found += [
            Figure(name=f"replay, {kind}", values=[rate(each).wall for each in turns], unit="changes/s"),
            Figure(
                name=f"replay ÷ append, {kind}",
                values=[rate(each).wall / each.append.wall for each in turns],
                unit="",
                goal=REPLAY_TIMES,
                smaller_is_better=False,
            ),
            Figure(
                name=f"… in CPU seconds, {kind}",
                values=[rate(each).cpu / each.append.cpu for each in turns],
                unit="",
            ),
            Figure(
                name=f"replay ÷ read and crc32 in one thread, {kind}",
                values=[rate(each).wall / each.checksum.wall for each in turns],
                unit="",
            ),
        ]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
