"""What is read ahead is given in order, checked, and no sooner than what is damaged before it."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from log.appending import append

from deltaworks.log import ahead, segment
from deltaworks.log.ahead import CheckedRun, Run, checked
from deltaworks.log.change_log import CorruptLogError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment import frames
from deltaworks.log.segment_file import opened, segments

SEGMENT_BYTES = 400_000


def filled(folder: Path, *, seed: int = 0, groups: int = 300, is_sealed: bool = False) -> list[list[int]]:
    """Groups of all sizes over several segments: some are larger than a run, some segments hold many runs."""
    chance = random.Random(seed)
    expected = []
    with LocalLogWriter.open(folder, segment_bytes=SEGMENT_BYTES) as writer:
        for number in range(groups):
            ids = list(range(number, number + chance.choice([1, 3, 40, 900, 4_000])))
            append(writer, ids)
            expected.append(ids)
    if is_sealed:
        seal_closed(folder, level=1)
    return expected


def taken(reader: LocalLogReader, **how: int | None) -> Iterator[list[int]]:
    for group in reader.read(**{"after_sequence": -1, **how}):  # type: ignore[arg-type]  # the two it has
        [batch] = group.batches
        yield batch.rows.column("id").to_pylist()


def until_damage(groups: Iterator[list[int]], *, said: str) -> list[list[int]]:
    """What is given before the error."""
    given: list[list[int]] = []
    with pytest.raises(CorruptLogError, match=said):
        given.extend(groups)
    return given


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs so small that a log of a megabyte has many."""
    monkeypatch.setattr("deltaworks.log.local_reader.RUN_BYTES", 20_000)
    monkeypatch.setattr("deltaworks.log.local_reader.FIRST_BYTES", 2_000)
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 100_000)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_groups_of_all_sizes_come_in_order_and_in_bites(tmp_path: Path, *, is_sealed: bool) -> None:
    expected = filled(tmp_path, is_sealed=is_sealed)
    reader = LocalLogReader(tmp_path)
    assert list(taken(reader)) == expected
    read: list[list[int]] = []
    while bite := list(taken(reader, after_sequence=len(read) - 1, max_changes=5_000)):
        assert sum(map(len, bite[:-1])) < 5_000
        read += bite
    assert read == expected
    # Whoever has enough and goes leaves nothing behind.
    for _ in taken(reader):
        break


@pytest.mark.parametrize("is_sealed", [False, True])
def test_all_before_a_damaged_group_is_given_and_nothing_of_it_or_behind(tmp_path: Path, *, is_sealed: bool) -> None:
    expected = filled(tmp_path, groups=60, is_sealed=is_sealed)
    first = segments(tmp_path)[1]
    with opened(tmp_path, first) as found:
        path, starts = found.path, [frame.start for frame in frames(found.bytes)]
    whole = path.read_bytes()
    chance = random.Random(1)
    for _ in range(15):
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        # Of a sealed segment all of the block is lost, here all of the segment.
        sound = first if is_sealed else first + sum(start <= at for start in starts) - 1
        assert until_damage(taken(LocalLogReader(tmp_path)), said=path.name) == expected[:sound]
    for cut in (starts[3], starts[3] + 11):
        path.write_bytes(whole[: cut * len(whole) // (starts[-1] * 2) if is_sealed else cut])
        sound = first if is_sealed else first + 3
        assert until_damage(taken(LocalLogReader(tmp_path)), said=rf"{path.name}|was durable") == expected[:sound]


def test_no_more_is_held_than_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    held: list[int] = []

    def counting(run: Run) -> CheckedRun:
        held.append(run.end - run.start)
        return check_run(run)

    check_run = ahead.check_run
    monkeypatch.setattr(ahead, "check_run", counting)
    sizes = []
    for first in segments(tmp_path):
        with opened(tmp_path, first) as found:
            sizes += [frame.end - frame.start for frame in frames(found.bytes)]
    done = most = 0
    for size, _ in zip(sizes, LocalLogReader(tmp_path).read(after_sequence=-1), strict=True):
        # The run of the group that was just given is not ahead any more.
        most = max(most, sum(held) - done)
        done += size
    assert len(held) > 20
    assert 100_000 <= most <= 100_000 + 2 * max(held)
    held.clear()
    # Who asks for one group has one read.
    next(LocalLogReader(tmp_path).read(after_sequence=-1, max_changes=1))
    assert len(held) == 1


def test_what_goes_wrong_in_the_plan_waits_for_its_turn(tmp_path: Path) -> None:
    filled(tmp_path, groups=6)

    def plan() -> Iterator[Run]:
        for number in range(3):
            yield Run.of_plain(found, number, starts[number], most_groups=1, window_bytes=4_096)
        raise CorruptLogError("behind the third")

    with opened(tmp_path, 0) as found:
        starts = [frame.start for frame in frames(found.bytes)]
        runs = checked(plan(), wanted_bytes=lambda: math.inf)
        given = until_damage(([frame.start for frame, _ in run.frames] for run in runs), said="behind the third")
    assert given == [[start] for start in starts[:3]]


def test_a_log_of_an_older_version_is_read_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its frames begin anywhere, those of now at multiples of 8.
    with monkeypatch.context() as before:
        before.setattr(segment, "_ALIGNMENT", 1)
        expected = filled(tmp_path, groups=50)
    with opened(tmp_path, 0) as found:
        assert any(frame.body_start % 8 for frame in frames(found.bytes))
    with LocalLogWriter.open(tmp_path, segment_bytes=SEGMENT_BYTES) as writer:
        append(writer, [7])
    for _ in range(2):
        for group in LocalLogReader(tmp_path).read(after_sequence=-1):
            assert all(buffer.address % 8 == 0 for buffer in buffers(group.batches[0].rows))
        assert list(taken(LocalLogReader(tmp_path))) == [*expected, [7]]
        seal_closed(tmp_path, level=1)


def test_frames_of_now_begin_where_arrow_likes_it(tmp_path: Path) -> None:
    filled(tmp_path, groups=50)
    with opened(tmp_path, 0) as found:
        assert {frame.body_start % 8 for frame in frames(found.bytes)} == {0}


def buffers(rows: pa.RecordBatch) -> list[pa.Buffer]:
    return [buffer for column in rows.columns for buffer in column.buffers() if buffer is not None and buffer.size]
