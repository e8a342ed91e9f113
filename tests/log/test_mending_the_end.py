"""A log whose end is damaged: what was never acknowledged is cut, what was durable is whole or a named gap."""

import errno
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from log.test_mending import DAMAGES, append, damage, filled, place_of, read, rows_of

from deltaworks.log.audit import audit_log
from deltaworks.log.change_log import CorruptLogError, LogEnd, LogFailedError, StoredGroup
from deltaworks.log.end_file import read_last
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.mending import LocalMending
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment import PlainBytes, frames
from deltaworks.log.segment_file import segment_files, segments
from deltaworks.log.verify import verify_log
from deltaworks.testing.faults import fail_at

TESTS = Path(__file__).parent.parent


def opened(folder: Path, *, segment_bytes: int = 5_000) -> LocalLogWriter:
    """A writer that mends what it finds damaged, as that of capture does."""
    return LocalLogWriter.open(folder, segment_bytes=segment_bytes, mend_end=LocalMending(folder).mend_end)


def last_file(folder: Path) -> Path:
    return segment_files(folder)[segments(folder)[-1]][0]


def frame_places(path: Path) -> dict[int, tuple[int, int, int]]:
    """Where the frame of each group in a plain file begins, where its body does, and where it ends."""
    with path.open("rb") as file:
        found = list(frames(PlainBytes(file.fileno())))
    return {frame.header().sequence: (frame.start, frame.body_start, frame.end) for frame in found}


def die_in_an_append(folder: Path, count: int, *, is_partial: bool) -> None:
    """Leave a whole group behind the end that nobody was told of."""
    with (
        LocalLogWriter.open(folder, segment_bytes=5_000) as writer,
        fail_at("log.before_fsync", OSError(errno.EIO, "injected")),
        pytest.raises(LogFailedError),
    ):
        append(writer, count, is_partial=is_partial)


def check_mended(folder: Path, before: list[StoredGroup], left: bytes, whole: dict[int, bytes]) -> set[int]:
    """Whatever was durable is there as it was, or a gap in its place; those that are lost.

    `left` is what is left of the damaged file, `whole` the frames that were in it.
    """
    after = read(folder)
    assert [group.header.sequence for group in after] == list(range(len(after)))
    assert len(after) >= len(before)
    lost = set()
    for old, new in zip(before, after, strict=False):
        sequence = old.header.sequence
        if new.header.lost is None:
            assert (new.header, rows_of(new)) == (old.header, rows_of(old))
        else:
            lost.add(sequence)
            assert new.batches == ()
            assert whole.get(sequence, b"gone") not in left
    lost |= {group.header.sequence for group in after[len(before) :] if group.header.lost is not None}
    told = LocalMending(folder).lost()
    assert {number for each in told for number in range(each.first, each.last + 1)} == lost
    changes = sum(old.header.next_offset - old.header.offset for old in before if old.header.sequence in lost)
    assert sum(each.changes for each in told) >= changes
    verification = verify_log(LocalLogReader(folder))
    assert verification.is_whole, verification.faults
    assert audit_log(LocalLogReader(folder), hop="log").losses == ()
    return lost


def without_epoch(end: LogEnd) -> LogEnd:
    return replace(end, epoch=0)


@settings(max_examples=150, deadline=None)
# A group that nobody was told of stands where a durable one is missing, so that there are as many as were durable.
@example(counts=[0], unacknowledged=(0, True), how=4, where=0.0, seed=0, segment_bytes=1, is_sealed=False)
@example(counts=[0], unacknowledged=(0, False), how=4, where=0.0, seed=0, segment_bytes=1, is_sealed=False)
@example(counts=[3, 5, 2], unacknowledged=(4, True), how=4, where=0.4, seed=0, segment_bytes=1 << 26, is_sealed=False)
@example(counts=[3, 5, 2], unacknowledged=(4, False), how=4, where=0.4, seed=0, segment_bytes=1 << 26, is_sealed=False)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    unacknowledged=st.none() | st.tuples(st.integers(0, 60), st.booleans()),
    how=st.integers(0, len(DAMAGES) - 1),
    where=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 999),
    segment_bytes=st.sampled_from((1, 5_000, 1 << 26)),
    is_sealed=st.booleans(),
)
def test_damage_at_any_byte_of_the_last_segment_is_cut_or_a_named_gap(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    unacknowledged: tuple[int, bool] | None,
    how: int,
    where: float,
    seed: int,
    segment_bytes: int,
    is_sealed: bool,
) -> None:
    folder = tmp_path_factory.mktemp("end")
    filled(folder, counts, segment_bytes=segment_bytes)
    if is_sealed:
        seal_closed(folder, level=1)
    before, end = read(folder), LocalLogReader(folder).end()
    if unacknowledged is not None:
        die_in_an_append(folder, unacknowledged[0], is_partial=unacknowledged[1])
    path = last_file(folder)
    content = path.read_bytes()
    whole = {number: content[start:stop] for number, (start, _, stop) in frame_places(path).items()}
    damage(path, how, where, seed)
    if not segments(folder):
        # Nothing of the log is left: no gap can stand for all of it.
        with pytest.raises(CorruptLogError, match="dump the source again"):
            opened(folder)
        return
    left = path.read_bytes() if path.exists() else b""

    # Where nothing may be mended, nothing that was durable is cut either, and the error says what to do.
    try:
        LocalLogWriter.open(folder).close()
    except CorruptLogError as error:
        assert "deltaworks log mend" in str(error)  # noqa: PT017 - most damage is not seen by opening
    with opened(folder) as writer:
        # A group that nobody was told of is whole or absent.
        assert writer.end().sequence - end.sequence in (0, int(unacknowledged is not None and not unacknowledged[1]))
        if writer.end().sequence == end.sequence:
            assert without_epoch(writer.end()) == without_epoch(end)
        append(writer, 3)
        # What opening does not look at, the first reader meets.
        mending = LocalMending(folder, end_segment=writer.end_segment)
        mending.look_through()
        if mending.suspects():
            mending.heed()
            append(writer, 1)
            mending.heed()
        assert mending.suspects() == []
    check_mended(folder, before, left, whole)
    # And it is a log like any other.
    LocalLogWriter.open(folder).close()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    how=st.integers(0, len(DAMAGES) - 1),
    where=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 999),
    appends_first=st.booleans(),
)
def test_damage_under_an_open_writer_is_a_named_gap_after_its_next_group(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], how: int, where: float, seed: int, appends_first: bool
) -> None:
    folder = tmp_path_factory.mktemp("open")
    filled(folder, counts)
    before = read(folder)
    path = last_file(folder)
    content = path.read_bytes()
    whole = {number: content[start:stop] for number, (start, _, stop) in frame_places(path).items()}
    with LocalLogWriter.open(folder) as writer:
        damage(path, how, where, seed)
        if not segments(folder):
            return
        left = path.read_bytes() if path.exists() else b""
        if appends_first:
            append(writer, 2)
        mending = LocalMending(folder, end_segment=writer.end_segment)
        for _ in range(3):
            with suppress(CorruptLogError):
                read(folder)
            mending.heed()
            if mending.suspects():
                assert mending.awaits_group
                append(writer, 1)
                mending.heed()
            assert not mending.awaits_group
        assert mending.suspects() == []
        assert LocalLogReader(folder).end().sequence == writer.end().sequence
        assert without_epoch(LocalLogReader(folder).end()) == without_epoch(writer.end())
    check_mended(folder, before, left, whole)


def rot_body(folder: Path) -> list[int]:
    path = last_file(folder)
    (sequence, (_, body, _)) = max(frame_places(path).items())
    content = bytearray(path.read_bytes())
    content[body + 200] ^= 8
    path.write_bytes(content)
    return [sequence]


def rot_header(folder: Path) -> list[int]:
    path = last_file(folder)
    (sequence, (start, _, _)) = max(frame_places(path).items())
    content = bytearray(path.read_bytes())
    content[start + 40] ^= 8
    path.write_bytes(content)
    return [sequence]


def rot_an_earlier_header(folder: Path) -> list[int]:
    path = last_file(folder)
    (sequence, (start, _, _)) = min(frame_places(path).items())
    content = bytearray(path.read_bytes())
    content[start + 40] ^= 8
    path.write_bytes(content)
    return [sequence]


def cut_between_frames(folder: Path) -> list[int]:
    path = last_file(folder)
    *_, (_, (_, _, stop)), (sequence, _) = sorted(frame_places(path).items())
    path.write_bytes(path.read_bytes()[:stop])
    return [sequence]


def cut_all(folder: Path) -> list[int]:
    path = last_file(folder)
    lost = sorted(frame_places(path))
    path.write_bytes(b"")
    return lost


def lose_file(folder: Path) -> list[int]:
    lost = sorted(frame_places(last_file(folder)))
    last_file(folder).unlink()
    return lost


def lose_file_behind_a_sealed_one(folder: Path) -> list[int]:
    seal_closed(folder, level=1)
    return lose_file(folder)


def filled_for_rot(folder: Path) -> None:
    """A log of some segments, with some groups in the last one."""
    filled(folder, [40] * 15, segment_bytes=40_000)
    assert len(segments(folder)) > 2
    assert len(frame_places(last_file(folder))) > 2


ROTS: dict[str, Callable[[Path], list[int]]] = {
    rot.__name__: rot
    for rot in (
        rot_body,
        rot_header,
        rot_an_earlier_header,
        cut_between_frames,
        cut_all,
        lose_file,
        lose_file_behind_a_sealed_one,
    )
}


@pytest.mark.parametrize("rot", ROTS.values(), ids=ROTS)
def test_a_log_with_a_damaged_end_is_refused_by_name_or_opened_with_a_gap(
    rot: Callable[[Path], list[int]], tmp_path: Path
) -> None:
    filled_for_rot(tmp_path)
    before, end = read(tmp_path), LocalLogReader(tmp_path).end()
    known = LocalLogReader(tmp_path)
    assert known.end() == end
    victims = rot(tmp_path)
    with pytest.raises(CorruptLogError, match="deltaworks log mend"):
        LocalLogWriter.open(tmp_path)
    with opened(tmp_path) as writer:
        assert without_epoch(writer.end()) == without_epoch(end)
        append(writer, 2)
    after = read(tmp_path)
    assert [group.header.sequence for group in after if group.header.lost is not None] == victims
    kept = [group for group in before if group.header.sequence not in victims]
    assert [place_of(group.header) for group in kept] == [
        place_of(group.header) for group in after[: len(before)] if group.header.lost is None
    ]
    (lost,) = LocalMending(tmp_path).owed()
    # The header of the last one is known by the published end; of those before it, only where they were.
    is_known = rot in (rot_body, rot_header, cut_between_frames)
    assert lost.tables == (("public.movie",) if is_known else None)
    assert (lost.since, lost.until) == (before[victims[0] - 1].header.position, before[victims[-1]].header.position)
    assert LocalMending(tmp_path).suspects() == []
    assert len(list(known.read(after_sequence=-1))) == len(after)


def test_a_torn_tail_is_cut_and_no_gap_is_made_of_it(tmp_path: Path) -> None:
    filled(tmp_path, [40] * 3, segment_bytes=1 << 26)
    before = read(tmp_path)
    die_in_an_append(tmp_path, 40, is_partial=False)
    whole = last_file(tmp_path).read_bytes()
    (start, body, stop) = frame_places(last_file(tmp_path))[len(before)]
    for cut in (start + 1, start + 20, body, body + 100, stop - 1):
        last_file(tmp_path).write_bytes(whole[:cut])
        with opened(tmp_path) as writer:
            assert writer.end().sequence == len(before) - 1
        assert len(read(tmp_path)) == len(before)
    assert LocalMending(tmp_path).lost() == []
    assert not (tmp_path / "damaged").exists()


def test_the_parts_of_a_transaction_whose_last_one_is_lost_are_kept(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path) as writer:
        append(writer, 5)
        append(writer, 5, is_partial=True)
        append(writer, 5, goes_on=True)
    before = read(tmp_path)
    [last] = cut_between_frames(tmp_path)
    # Refusing cuts nothing.
    with pytest.raises(CorruptLogError):
        LocalLogWriter.open(tmp_path)
    opened(tmp_path).close()
    after = read(tmp_path)
    assert rows_of(after[1]) == rows_of(before[1])
    assert [group.header.sequence for group in after if group.header.lost is not None] == [last]
    assert place_of(after[last].header) == place_of(before[last].header)


def test_an_end_of_an_older_version_says_too_little_to_mend_and_it_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [40] * 3, segment_bytes=1 << 26)
    published = (tmp_path / "end").read_bytes()
    (tmp_path / "end").write_bytes(published[:24])
    # The next writer completes it.
    LocalLogWriter.open(tmp_path).close()
    assert read_last(tmp_path) == read(tmp_path)[-1].header
    [last] = rot_header(tmp_path)
    (tmp_path / "end").write_bytes((tmp_path / "end").read_bytes()[:24])
    damaged = last_file(tmp_path).read_bytes()
    with pytest.raises(CorruptLogError, match=f"no group after {last} can be read, nor does its file `end`"):
        opened(tmp_path)
    assert last_file(tmp_path).read_bytes() == damaged


def test_what_the_oldest_group_had_is_not_known_where_what_came_before_is_retired(tmp_path: Path) -> None:
    filled(tmp_path, [40] * 16)
    (first, second, *_) = segments(tmp_path)
    segment_files(tmp_path)[first][0].unlink()
    path = segment_files(tmp_path)[second][0]
    content = bytearray(path.read_bytes())
    content[40] ^= 8
    path.write_bytes(content)
    with opened(tmp_path):
        mending = LocalMending(tmp_path)
        mending.look_through()
        assert mending.heed()
    (lost,) = mending.owed()
    assert lost.tables is None
    assert lost.may_have_changes


DEATHS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from log.test_mending import append, read, rows_of
from log.test_mending_the_end import ROTS, filled_for_rot, opened
from deltaworks.log.local import LocalLogReader
from deltaworks.log.mending import LocalMending
from deltaworks.testing.faults import kill_at

STEPS = (
    "before_mend_write", "after_mend_write", "before_set_aside", "after_set_aside", "before_mend_rename",
    "after_mend_rename", "after_mend_unlink",
)
for name, rot in ROTS.items():
    for step in STEPS:
        folder = Path({folder!r}) / name / step
        filled_for_rot(folder)
        whole, end = read(folder), LocalLogReader(folder).end()
        victims = rot(folder)
        child = os.fork()
        if child == 0:
            kill_at("log." + step)
            opened(folder)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, step, status)
        with opened(folder) as writer:
            assert writer.end().position == end.position and writer.end().offset == end.offset, (name, step)
            assert writer.end().progress == end.progress, (name, step)
            append(writer, 1)
        after = read(folder)[: len(whole)]
        lost = [group.header.sequence for group in after if group.header.lost is not None]
        assert lost == victims, (name, step, lost, victims)
        for old, new in zip(whole, after, strict=True):
            assert new.header.lost is not None or rows_of(old) == rows_of(new), (name, step)
        # Each loss is owed once, and the file is there still.
        owed = LocalMending(folder).owed()
        assert [(each.first, each.last) for each in owed] == [(victims[0], victims[-1])], (name, step)
        asides = [path for path in (folder / "damaged").iterdir() if path.suffix in (".segment", ".sealed")]
        is_rewritten = name in ("rot_body", "rot_header", "rot_an_earlier_header", "cut_all")
        assert len(asides) == is_rewritten, (name, step, asides)
        assert not list(folder.glob("*.mending")), (name, step)
print("done")
"""


def test_a_mending_of_the_end_that_dies_anywhere_is_done_again_and_owes_each_loss_once(tmp_path: Path) -> None:
    code = DEATHS.format(tests=str(TESTS), folder=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith("done\n"), child.stdout
