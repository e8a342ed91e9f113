"""Sealed segments: the same groups, less room, found by index, and whole whenever the process dies."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log.appending import append

from deltaworks import faults
from deltaworks.config import LocalLogConfig
from deltaworks.log import find
from deltaworks.log.change_log import (
    CorruptLogError,
    Group,
    GroupHeader,
    LogFormatError,
    LogReader,
    OffsetRetiredError,
    StoredGroup,
)
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.registry import LocalLog
from deltaworks.log.retention import retire
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment_file import segment_files, segments, usage
from deltaworks.log.takeover import take_over
from deltaworks.log.until import LogUntil, last_group_at
from deltaworks.position import Lsn

TESTS = Path(__file__).parent.parent


def filled(folder: Path, counts: list[int], *, segment_bytes: int = 6_000) -> None:
    with LocalLogWriter.open(folder, segment_bytes=segment_bytes) as writer:
        for number, count in enumerate(counts):
            append(writer, [number] * count)


def groups(folder: Path, after: int = -1) -> list[tuple[GroupHeader, list[object]]]:
    return [as_values(group) for group in LocalLogReader(folder).read(after_sequence=after)]


def as_values(group: StoredGroup) -> tuple[GroupHeader, list[object]]:
    return group.header, [batch.rows.to_pylist() for batch in group.batches]


def suffixes(folder: Path) -> list[list[str]]:
    return [[path.suffix for path in paths] for paths in segment_files(folder).values()]


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=40), segment_bytes=st.sampled_from([1, 4_000, 40_000]))
def test_a_sealed_log_reads_the_same_from_everywhere(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], segment_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("sealed")
    filled(folder, counts, segment_bytes=segment_bytes)
    before, reader = groups(folder), LocalLogReader(folder)
    places = [reader.place(number) for number in range(len(counts))]
    seal_closed(folder, level=1)
    assert suffixes(folder) == [[".sealed"]] * (len(segments(folder)) - 1) + [[".segment"]]
    assert groups(folder) == before
    assert [header for header, _ in before][::-1] == list(LocalLogReader(folder).headers_backwards())
    for number in range(len(counts)):
        assert groups(folder, number - 1) == before[number:]
        assert LocalLogReader(folder).place(number) == places[number] == reader.place(number)
    # A writer opens it, appends, and a reader from before goes on.
    with LocalLogWriter.open(folder, segment_bytes=segment_bytes) as writer:
        append(writer, [77])
    assert len(list(reader.read(after_sequence=len(counts) - 1))) == 1


def test_places_are_found_by_the_index_as_by_reading_headers(tmp_path: Path) -> None:
    filled(tmp_path, [random.randint(1, 90) for _ in range(60)])
    seal_closed(tmp_path, level=1)
    min(tmp_path.glob("*.sealed")).unlink()
    indexed = LocalLogReader(tmp_path)
    # Of a log up to its last group it is not known where groups stand, so its headers are read.
    scanned = LogUntil(indexed, sequence=59)
    times = [header.appended_at for header in indexed.headers_backwards()]
    for number in [*range(0, indexed.end().offset, 41), indexed.end().offset, indexed.end().offset + 1]:
        assert outcome(find.at_offset, indexed, number) == outcome(find.at_offset, scanned, number)
    for number in range(63):
        assert outcome(find.at_sequence, indexed, number) == outcome(find.at_sequence, scanned, number)
        assert outcome(find.at_position, indexed, Lsn(number)) == outcome(find.at_position, scanned, Lsn(number))
        assert last_group_at(indexed, Lsn(number)) == last_group_at(scanned, Lsn(number))
    for moment in (*times, times[0] + timedelta(hours=1), datetime(1970, 1, 1, tzinfo=UTC)):
        assert outcome(find.at_time, indexed, moment) == outcome(find.at_time, scanned, moment)


def outcome(look: Callable[[LogReader, Any], GroupHeader], reader: LogReader, place: object) -> GroupHeader | None:
    try:
        return look(reader, place)
    except find.NoSuchGroupError:
        return None


def test_a_reader_within_a_segment_goes_on_when_it_is_sealed(tmp_path: Path) -> None:
    filled(tmp_path, [50] * 20)
    expected = [number for number, _ in enumerate([50] * 20)]
    reading = LocalLogReader(tmp_path).read(after_sequence=-1)
    seen = [next(reading).header.sequence]
    seal_closed(tmp_path, level=1)
    assert seen + [group.header.sequence for group in reading] == expected


def test_a_writer_seals_what_it_closes_and_says_what_it_takes(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path, segment_bytes=60_000, seal_level=1) as writer:
        for number in range(60):
            append(writer, [number] * 200)
    taken = usage(tmp_path)
    assert taken.sealed >= 1
    assert taken.bytes < taken.plain_bytes
    with LocalLog("x", tmp_path, LocalLogConfig(), cache=tmp_path / "cache").writer():
        pass
    with LocalLogWriter.open(tmp_path) as writer:
        assert writer.end().sequence == 59
    assert [header.sequence for header, _ in groups(tmp_path)] == list(range(60))


def test_what_is_not_to_be_sealed_stays_plain(tmp_path: Path) -> None:
    filled(tmp_path, [50] * 20)
    LocalLog("x", tmp_path, LocalLogConfig(seal=False), cache=tmp_path / "cache").writer().close()
    assert usage(tmp_path).sealed == 0


def test_parts_of_an_unfinished_transaction_seal_nothing(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as writer:
        append(writer, [1])
        end = writer.end()
        for _ in range(3):
            writer.append(Group(batches=(), position=end.position, previous_position=end.position, is_partial=True))
        seal_closed(tmp_path, level=1)
        assert [".sealed"] not in suffixes(tmp_path)
        writer.append(Group(batches=(), position=end.position, previous_position=end.position))
        seal_closed(tmp_path, level=1)
        assert suffixes(tmp_path) == [[".sealed"]] * 4 + [[".segment"]]


def test_sealed_segments_are_retired_and_taken_over(tmp_path: Path) -> None:
    filled(tmp_path, [50] * 20)
    seal_closed(tmp_path, level=1)
    last = segments(tmp_path)[-1]
    take_over(tmp_path)
    with LocalLogWriter.open(tmp_path) as writer:
        append(writer, [1])
    done = retire(tmp_path, LocalLogConfig(max_bytes=1), read_up_to={}, now=datetime.now(UTC))
    assert (done.oldest_sequence, suffixes(tmp_path)) == (last, [[".segment"]])
    assert [header.sequence for header, _ in groups(tmp_path, last - 1)] == list(range(last, 21))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_in_a_sealed_segment_is_named_and_never_read_as_data(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    filled(tmp_path, [50] * 20)
    before = groups(tmp_path)
    seal_closed(tmp_path, level=1)
    victim = min(tmp_path.glob("*.sealed"))
    whole = victim.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        with pytest.raises((CorruptLogError, LogFormatError), match=rf"{victim.name}|format \d+"):
            groups(tmp_path)
    victim.write_bytes(whole)
    assert groups(tmp_path) == before


def test_a_damaged_segment_is_not_sealed(tmp_path: Path) -> None:
    filled(tmp_path, [50] * 20)
    victim = min(tmp_path.glob("*.segment"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    seal_closed(tmp_path, level=1)
    assert victim.exists()
    assert not victim.with_suffix(".sealed").exists()
    assert usage(tmp_path).sealed > 0


LIVES = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from log.appending import append
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment_file import segment_files
from deltaworks.testing.faults import kill_at

PARTS = ("write", "fsync", "rename", "unlink")
STEPS = [f"log.{{when}}_seal_{{part}}" for part in PARTS for when in ("before", "after")]

def ids(folder):
    return [group.batches[0].rows.column("id").to_pylist() for group in LocalLogReader(folder).read(after_sequence=-1)]

for step in STEPS:
    folder = Path({folder!r}) / step
    with LocalLogWriter.open(folder, segment_bytes=6_000) as writer:
        for number in range(30):
            append(writer, [number] * 50)
    known = ids(folder)
    for after in range(4):
        child = os.fork()
        if child == 0:
            kill_at(step, after=after % 2)
            seal_closed(folder, level=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or not any(len(paths) > 1 for paths in segment_files(folder).values())
        assert ids(folder) == known, step
        LocalLogWriter.open(folder, segment_bytes=6_000).close()
        assert ids(folder) == known, step
    seal_closed(folder, level=1)
    suffixes = [[path.suffix for path in paths] for paths in segment_files(folder).values()]
    assert suffixes == [[".sealed"]] * (len(suffixes) - 1) + [[".segment"]], (step, suffixes)
    assert not list(folder.glob("*.sealing")), step
    assert ids(folder) == known, step
    print(step)
"""


def test_killed_at_every_step_of_sealing_the_log_opens_and_reads_the_same(tmp_path: Path) -> None:
    code = LIVES.format(tests=str(TESTS), folder=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert child.returncode == 0, child.stderr
    assert len(child.stdout.split()) == 8


def test_reading_retiring_and_sealing_at_once_meet_no_hole(tmp_path: Path) -> None:
    stop, failures = threading.Event(), []

    def read() -> None:
        reader, last = LocalLogReader(tmp_path), -1
        while not stop.is_set():
            try:
                for group in reader.read(after_sequence=last):
                    last = group.header.sequence
            except OffsetRetiredError:
                oldest = reader.oldest()
                last = oldest.sequence - 1 if oldest is not None else last
            except Exception as error:
                failures.append(error)
                return

    def shorten() -> None:
        while not stop.is_set():
            try:
                retire(tmp_path, LocalLogConfig(max_bytes=30_000), read_up_to={}, now=datetime.now(UTC))
            except Exception as error:
                failures.append(error)
                return

    with LocalLogWriter.open(tmp_path, segment_bytes=6_000, seal_level=1) as writer:
        append(writer, [0])
        threads = [threading.Thread(target=each) for each in (read, read, shorten)]
        for thread in threads:
            thread.start()
        for number in range(300):
            append(writer, [number] * 50)
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    known = segments(tmp_path)
    assert [header.sequence for header, _ in groups(tmp_path, known[0] - 1)] == list(range(known[0], 301))
    assert os.listdir(tmp_path)


def test_sealed_copy_that_was_damaged_before_its_plain_file_went_is_made_anew(tmp_path: Path) -> None:
    filled(tmp_path, [50] * 20)
    expected = groups(tmp_path)

    def fail() -> None:
        raise OSError("the disk is away")

    faults.arm("log.before_seal_unlink", fail)
    with pytest.raises(OSError, match="disk is away"):
        seal_closed(tmp_path, level=1)
    faults.disarm()
    (sealed,) = tmp_path.glob("*.sealed")
    content = bytearray(sealed.read_bytes())
    content[len(content) // 3] ^= 1
    sealed.write_bytes(content)
    seal_closed(tmp_path, level=1)
    assert not sealed.with_suffix(".segment").exists()
    assert groups(tmp_path) == expected
