"""What only a log on a disk can get wrong: crashes, full disks, damage, other processes."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log.appending import append

from deltaworks.log import local_reader
from deltaworks.log.change_log import (
    CorruptLogError,
    FencedError,
    LogFailedError,
    LogFormatError,
    LogFullError,
    OffsetRetiredError,
)
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.segment_file import segments
from deltaworks.testing.faults import fail_at

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from log.appending import append
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.testing.faults import kill_at
folder = Path({folder!r})
"""


def read_ids(folder: Path, after_sequence: int = -1) -> list[list[int]]:
    groups = LocalLogReader(folder).read(after_sequence=after_sequence)
    return [group.batches[0].rows.column("id").to_pylist() for group in groups]


def filled(folder: Path, count: int, *, segment_bytes: int = 1 << 26) -> None:
    with LocalLogWriter.open(folder, segment_bytes=segment_bytes) as writer:
        for number in range(count):
            append(writer, [number])


def last_segment(folder: Path) -> Path:
    return max(folder.glob("*.segment"))


def run_child(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    head = CHILD.format(tests=str(Path(__file__).parent.parent), folder=str(folder))
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )


# Crashes.


@pytest.mark.parametrize("step", ["log.before_write", "log.after_write", "log.before_fsync", "log.after_fsync"])
def test_acknowledged_groups_survive_a_kill_and_the_others_are_whole_or_absent(tmp_path: Path, step: str) -> None:
    folder = tmp_path / "log"
    child = run_child(
        folder,
        f"""
        writer = LocalLogWriter.open(folder, segment_bytes=4_000)
        kill_at({step!r}, after=7)
        for number in range(20):
            append(writer, [number, number])
            print(number, flush=True)
        """,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    acknowledged = [int(line) for line in child.stdout.split()]
    assert acknowledged == list(range(7))

    with LocalLogWriter.open(folder) as writer:
        kept = read_ids(folder)
        assert kept in ([[number, number] for number in range(7)], [[number, number] for number in range(8)])
        append(writer, [99])
    assert read_ids(folder) == [*kept, [99]]


def test_an_unacknowledged_group_is_not_seen_before_the_next_writer_has_synced_it(tmp_path: Path) -> None:
    child = run_child(
        tmp_path,
        """
        writer = LocalLogWriter.open(folder)
        append(writer, [1])
        kill_at("log.before_fsync")
        append(writer, [2])
        """,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert read_ids(tmp_path) == [[1]]
    LocalLogWriter.open(tmp_path).close()
    assert read_ids(tmp_path) == [[1], [2]]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 6),
    cut=st.integers(1, 2_000),
    flip=st.none() | st.tuples(st.integers(0, 5_000), st.integers(1, 255)),
    small=st.booleans(),
)
def test_whatever_a_crash_leaves_of_the_last_group_is_cut_or_kept_whole(
    tmp_path_factory: pytest.TempPathFactory, count: int, cut: int, flip: tuple[int, int] | None, small: bool
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    filled(folder, count, segment_bytes=2_500 if small else 1 << 26)
    # Given: one more group that was written by a writer that died before its sync.
    with LocalLogWriter.open(folder) as writer:
        segment, size = last_segment(folder), last_segment(folder).stat().st_size
        with fail_at("log.before_fsync", OSError(errno.EIO, "injected")), pytest.raises(LogFailedError):
            append(writer, list(range(50)))
    torn = bytearray(segment.read_bytes())
    tail = len(torn) - size
    if flip is not None and size + flip[0] % tail not in range(4):
        torn[size + flip[0] % tail] ^= flip[1]
        expected = None
    else:
        del torn[len(torn) - min(cut, tail) :]
        expected = [[number] for number in range(count)]
    segment.write_bytes(torn)

    with LocalLogWriter.open(folder) as writer:
        if expected is None:
            expected = [[number] for number in range(count)]
        assert read_ids(folder) == expected
        append(writer, [7])
    assert read_ids(folder) == [*expected, [7]]


# Damage to what was durable.


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), reopen=st.booleans())
def test_a_flipped_bit_in_a_durable_group_is_never_read_as_data(
    tmp_path_factory: pytest.TempPathFactory, where: float, flip: int, reopen: bool
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    filled(folder, 4)
    content = bytearray(last_segment(folder).read_bytes())
    content[int(where * len(content))] ^= flip
    last_segment(folder).write_bytes(content)
    if reopen:
        # Opening looks at headers and at the last group; damage behind them is found by who reads it.
        with contextlib.suppress(CorruptLogError):
            LocalLogWriter.open(folder).close()
    with pytest.raises(CorruptLogError):
        read_ids(folder)


def test_damage_is_named_by_file_group_and_byte(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    content = bytearray(last_segment(tmp_path).read_bytes())
    content[len(content) // 2] ^= 1
    last_segment(tmp_path).write_bytes(content)
    with pytest.raises(CorruptLogError, match=r"group 1 at byte \d+ of '.*0\.segment'.*checksum"):
        read_ids(tmp_path)


def test_a_lost_tail_that_was_acknowledged_is_damage_and_not_a_torn_tail(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    os.truncate(last_segment(tmp_path), last_segment(tmp_path).stat().st_size - 10)
    with pytest.raises(CorruptLogError, match="group 2"):
        LocalLogWriter.open(tmp_path)
    with pytest.raises(CorruptLogError, match="group 2"):
        LocalLogReader(tmp_path).end()


def test_a_lost_segment_in_the_middle_is_never_stepped_over(tmp_path: Path) -> None:
    filled(tmp_path, 30, segment_bytes=4_000)
    _, second, *_ = sorted(tmp_path.glob("*.segment"))
    second.unlink()
    reader = LocalLogReader(tmp_path)
    with pytest.raises(CorruptLogError, match="cannot find group"):
        list(reader.read(after_sequence=-1))


def test_groups_that_are_no_longer_kept_are_named(tmp_path: Path) -> None:
    filled(tmp_path, 30, segment_bytes=4_000)
    kept = segments(tmp_path)[1]
    min(tmp_path.glob("*.segment")).unlink()
    reader = LocalLogReader(tmp_path)
    with pytest.raises(OffsetRetiredError, match=f"from {kept} on"):
        list(reader.read(after_sequence=-1))
    assert [group.header.sequence for group in reader.read(after_sequence=kept)] == list(range(kept + 1, 30))
    assert [header.sequence for header in reader.headers_backwards()] == list(range(29, kept - 1, -1))


def test_a_file_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    foreign = tmp_path / f"{0:020d}.segment"
    foreign.write_bytes(b"PAR1 something else entirely, longer than a header")
    with pytest.raises(LogFormatError, match="not a segment"):
        LocalLogWriter.open(tmp_path)
    assert foreign.read_bytes().startswith(b"PAR1")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The only way to have a file of the next version is to write one with the number raised.
    monkeypatch.setattr("deltaworks.log.segment.FORMAT", 3)
    filled(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(LogFormatError, match="format 3"):
        LocalLogWriter.open(tmp_path)
    with pytest.raises(LogFormatError, match="upgrade"):
        LocalLogReader(tmp_path).end()


def test_the_end_is_found_again_when_its_file_is_lost(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    (tmp_path / "end").unlink()
    with pytest.raises(CorruptLogError, match="start the writer"):
        LocalLogReader(tmp_path).end()
    with LocalLogWriter.open(tmp_path) as writer:
        assert writer.end().sequence == 4
        assert writer.epoch == 2
    assert len(read_ids(tmp_path)) == 5


def test_an_end_that_is_too_small_after_a_power_cut_is_mended(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    earlier = (tmp_path / "end").read_bytes()
    filled(tmp_path, 3)
    (tmp_path / "end").write_bytes(earlier)
    assert len(read_ids(tmp_path)) == 1
    LocalLogWriter.open(tmp_path).close()
    assert len(read_ids(tmp_path)) == 4


# Disks that refuse.


def test_a_full_disk_stops_the_append_and_the_same_append_works_later(tmp_path: Path) -> None:
    # RLIMIT_FSIZE makes the kernel write a part of the frame and then refuse, as a full disk does.
    child = run_child(
        tmp_path,
        """
        import resource
        from deltaworks.log.change_log import LogFullError
        writer = LocalLogWriter.open(folder)
        append(writer, [1])
        size = next(folder.glob("*.segment")).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, hard))
        for _ in range(3):
            try:
                append(writer, list(range(100)))
            except LogFullError as error:
                assert "free space" in str(error), error
                assert next(folder.glob("*.segment")).stat().st_size == size
                print("full", LocalLogReader(folder).end().sequence)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print("appended", append(writer, list(range(100))))
        """,
    )
    assert child.stdout.split("\n")[:4] == ["full 0", "full 0", "full 0", "appended 1"], child.stderr
    assert read_ids(tmp_path) == [[1], list(range(100))]


def test_no_room_for_a_new_segment_is_a_full_disk_too(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as writer:
        append(writer, [1])
        with fail_at("log.before_write", OSError(errno.ENOSPC, "no space")), pytest.raises(LogFullError):
            append(writer, [2])
        assert len(segments(tmp_path)) == 2
        append(writer, [2])
    assert read_ids(tmp_path) == [[1], [2]]
    filled(tmp_path, 1)
    assert len(read_ids(tmp_path)) == 3


def test_after_a_failed_sync_the_writer_is_dead_and_the_log_is_whole(tmp_path: Path) -> None:
    writer = LocalLogWriter.open(tmp_path)
    append(writer, [1])
    with fail_at("log.before_fsync", OSError(errno.EIO, "input/output error")), pytest.raises(LogFailedError):
        append(writer, [2])
    with pytest.raises(LogFailedError, match="start the writer again"):
        append(writer, [3])
    assert read_ids(tmp_path) == [[1]]
    writer.close()
    with LocalLogWriter.open(tmp_path) as reopened:
        assert reopened.end().sequence in (0, 1)


def test_an_empty_last_segment_is_where_the_next_writer_goes_on(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    (tmp_path / f"{3:020d}.segment").touch()
    with LocalLogWriter.open(tmp_path) as writer:
        assert writer.end().sequence == 2
        append(writer, [3])
    assert read_ids(tmp_path) == [[0], [1], [2], [3]]


# Other processes.


def test_a_second_writer_is_told_who_holds_the_log(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path):
        child = run_child(tmp_path, "LocalLogWriter.open(folder)")
    assert child.returncode == 1
    assert f"process {os.getpid()} holds it" in child.stderr
    LocalLogWriter.open(tmp_path).close()


def test_a_writer_whose_folder_was_replaced_is_fenced(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    writer = LocalLogWriter.open(folder)
    append(writer, [1])
    folder.rename(tmp_path / "old")
    with LocalLogWriter.open(folder) as newer:
        append(newer, [5])
        append(newer, [6])
    LocalLogWriter.open(folder).close()
    with pytest.raises(FencedError, match="epoch"):
        append(writer, [2])
    assert read_ids(folder) == [[5], [6]]
    writer.close()


def test_a_reader_follows_a_log_that_was_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    reader = LocalLogReader(folder)
    filled(folder, 5)
    assert reader.end().sequence == 4
    folder.rename(tmp_path / "old")
    assert reader.end().sequence == -1
    filled(folder, 2)
    assert reader.end().sequence == 1


def test_a_reader_goes_on_from_where_it_was_in_this_log_and_in_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    reader = LocalLogReader(folder)
    with LocalLogWriter.open(folder) as writer:
        for number in range(5):
            append(writer, [number])
            [group] = reader.read(after_sequence=number - 1)
            assert (group.header.sequence, group.header.offset) == (number, number)
    folder.rename(tmp_path / "old")
    with LocalLogWriter.open(folder) as writer:
        for number in range(6):
            append(writer, [number, number])
    [group] = reader.read(after_sequence=4)
    assert group.header.offset == 10


def test_a_reader_in_another_process_wakes_soon_after_an_append(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    head = CHILD.format(tests=str(Path(__file__).parent.parent), folder=str(tmp_path))
    body = """
import time
reader = LocalLogReader(folder)
print("ready", flush=True)
for sequence in range(10):
    assert reader.wait(after_sequence=sequence, timeout_s=30)
    print(time.monotonic(), flush=True)
"""
    with (
        subprocess.Popen([sys.executable, "-c", head + body], stdout=subprocess.PIPE, text=True) as child,
        LocalLogWriter.open(tmp_path) as writer,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        delays_s = []
        for number in range(10):
            append(writer, [number])
            appended_at = time.monotonic()
            delays_s.append(float(child.stdout.readline()) - appended_at)
    # A lost notice costs a second.
    assert sorted(delays_s)[5] < 0.5


def test_asking_an_idle_log_for_its_end_reads_no_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 200)
    reader = LocalLogReader(tmp_path)
    end = reader.end()
    monkeypatch.setattr(local_reader, "opened", lambda *_: pytest.fail("a segment was opened"))
    assert reader.end() == end


def test_readers_see_whole_groups_only_while_another_process_appends(tmp_path: Path) -> None:
    head = CHILD.format(tests=str(Path(__file__).parent.parent), folder=str(tmp_path))
    body = """
writer = LocalLogWriter.open(folder, segment_bytes=50_000)
for number in range(300):
    append(writer, [number] * (number % 40 + 1))
"""
    reader = LocalLogReader(tmp_path)
    seen = -1
    with subprocess.Popen([sys.executable, "-c", head + body]) as child:
        while seen < 299 and (child.poll() in (None, 0)):
            reader.wait(after_sequence=seen, timeout_s=1)
            for group in reader.read(after_sequence=seen):
                seen += 1
                assert group.batches[0].rows.column("id").to_pylist() == [seen] * (seen % 40 + 1)
    assert seen == 299
    assert len(segments(tmp_path)) > 1
