"""After a power cut `end` may be of an earlier group. Then damage at the very end looks like a torn tail, and is cut.

The log says that it ends before what its source was told of, never anything else. See `proof.test_stale_end`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from log.test_mending import DAMAGES, append, damage, filled, mend, place_of, read, rows_of
from log.test_mending_the_end import (
    frame_places,
    last_file,
    opened,
    rot_an_earlier_header,
    rot_body,
    rot_header,
    without_epoch,
)

from deltaworks.log.change_log import EMPTY_END, CorruptLogError, LogFormatError, StoredGroup
from deltaworks.log.header import end_after
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.mending import LocalMending
from deltaworks.log.segment_file import segment_files, segments
from deltaworks.log.verify import verify_log

RECORD_BYTES = 24
"""What of `end` has a checksum and says how many groups are durable; the head of the last one is behind it."""


def of_an_earlier_group(file: Path, earlier: bytes) -> None:
    file.write_bytes(earlier)


def of_an_earlier_group_with_the_last_head(file: Path, earlier: bytes) -> None:
    file.write_bytes(earlier[:RECORD_BYTES] + file.read_bytes()[RECORD_BYTES:])


def of_an_earlier_group_with_half_a_head(file: Path, earlier: bytes) -> None:
    file.write_bytes(earlier[:-40])


def without_a_head(file: Path, earlier: bytes) -> None:
    file.write_bytes(earlier[:RECORD_BYTES])


def absent(file: Path, _: bytes) -> None:
    file.unlink()


def empty(file: Path, _: bytes) -> None:
    file.write_bytes(b"")


def torn(file: Path, earlier: bytes) -> None:
    file.write_bytes(earlier[: RECORD_BYTES // 2] + file.read_bytes()[RECORD_BYTES // 2 :])


def zeros(file: Path, earlier: bytes) -> None:
    file.write_bytes(bytes(len(earlier)))


STALE: dict[str, Callable[[Path, bytes], None]] = {
    stale.__name__: stale
    for stale in (
        of_an_earlier_group,
        of_an_earlier_group_with_the_last_head,
        of_an_earlier_group_with_half_a_head,
        without_a_head,
        absent,
    )
}
UNREADABLE: dict[str, Callable[[Path, bytes], None]] = {each.__name__: each for each in (empty, torn, zeros)}


def rot_at(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)


def rot_the_last_two(folder: Path) -> list[int]:
    path = last_file(folder)
    *_, (earlier, (start, _, _)), (last, (_, body, _)) = sorted(frame_places(path).items())
    rot_at(path, start + 40)
    # In its head, so that nothing whole is behind the other.
    rot_at(path, body - 8)
    return [earlier, last]


def rot_all(folder: Path) -> list[int]:
    """A file of zeros: what a disk gives that knows how long the file is, and nothing of what was in it."""
    path = last_file(folder)
    lost = sorted(frame_places(path))
    path.write_bytes(bytes(path.stat().st_size))
    return lost


def filled_beyond(folder: Path) -> bytes:
    """A log of two segments, and its `end` as it was some groups before the last one."""
    filled(folder, [40] * 9, segment_bytes=40_000)
    earlier = (folder / "end").read_bytes()
    with LocalLogWriter.open(folder, segment_bytes=1 << 26) as writer:
        for _ in range(3):
            append(writer, 40)
    assert len(segments(folder)) > 1
    assert len(frame_places(last_file(folder))) > 3
    return earlier


@pytest.mark.parametrize("rot", [rot_body, rot_header, rot_the_last_two, rot_all])
@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
@pytest.mark.parametrize("mends", [False, True])
def test_damage_at_the_end_that_a_stale_end_does_not_know_of_is_cut(
    stale: Callable[[Path, bytes], None], rot: Callable[[Path], list[int]], mends: bool, tmp_path: Path
) -> None:
    earlier = filled_beyond(tmp_path)
    before = read(tmp_path)
    first, *_ = rot(tmp_path)
    if rot is rot_all:
        # What `end` says to be durable is never cut, so it has to be of before all that is gone.
        filled(tmp_path / "short", [1])
        earlier = (tmp_path / "short" / "end").read_bytes()
    stale(tmp_path / "end", earlier)

    with opened(tmp_path) if mends else LocalLogWriter.open(tmp_path) as writer:
        end = writer.end()
        assert (end.sequence, end.offset, end.position, end.progress) == (
            first - 1,
            before[first].header.offset,
            before[first].header.previous_position,
            before[first - 1].header.progress,
        )
        # The source was told of this position and may have forgotten what led there.
        assert end.position < before[-1].header.position
        append(writer, 3)

    after = read(tmp_path)
    assert [(group.header, rows_of(group)) for group in after[:-1]] == [
        (group.header, rows_of(group)) for group in before[:first]
    ]
    assert after[-1].header.epoch > max(group.header.epoch for group in after[:-1])
    assert LocalMending(tmp_path).lost() == []
    assert verify_log(LocalLogReader(tmp_path)).is_whole


def test_who_has_read_what_was_cut_is_told(tmp_path: Path) -> None:
    earlier = filled_beyond(tmp_path)
    before = read(tmp_path)
    rot_the_last_two(tmp_path)
    of_an_earlier_group(tmp_path / "end", earlier)
    with opened(tmp_path) as writer:
        with pytest.raises(CorruptLogError, match="its tail was lost"):
            read(tmp_path, after=before[-1].header.sequence)
        for _ in range(3):
            append(writer, 2)
    # It has grown past the reader, whose place is not in it.
    [group] = read(tmp_path, after=before[-1].header.sequence)
    last = before[-1].header
    assert (group.header.offset, group.header.previous_position) != (last.next_offset, last.position)


@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
@pytest.mark.parametrize("rots_the_last", [False, True])
def test_a_whole_group_behind_damage_says_what_a_stale_end_does_not(
    stale: Callable[[Path, bytes], None], rots_the_last: bool, tmp_path: Path
) -> None:
    earlier = filled_beyond(tmp_path)
    before = read(tmp_path)
    last = frame_places(last_file(tmp_path))[before[-1].header.sequence][0]
    victims = rot_an_earlier_header(tmp_path)
    if rots_the_last:
        rot_at(last_file(tmp_path), last + 40)
    stale(tmp_path / "end", earlier)
    content = last_file(tmp_path).read_bytes()
    with pytest.raises(CorruptLogError, match="deltaworks log mend"):
        LocalLogWriter.open(tmp_path)
    assert last_file(tmp_path).read_bytes() == content
    with opened(tmp_path) as writer:
        assert writer.end().sequence == before[-1 - rots_the_last].header.sequence
        append(writer, 3)
    after = read(tmp_path)
    assert [group.header.sequence for group in after if group.header.lost is not None] == victims
    kept = before[: len(before) - rots_the_last]
    assert [place_of(group.header) for group in after[:-1]] == [place_of(group.header) for group in kept]
    (lost,) = LocalMending(tmp_path).owed()
    assert [*range(lost.first, lost.last + 1)] == victims


@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
def test_damage_that_reaches_into_a_closed_segment_is_refused_and_that_segment_is_left_as_it_is(
    stale: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    filled(tmp_path, [40] * 3, segment_bytes=1 << 26)
    earlier = (tmp_path / "end").read_bytes()
    filled(tmp_path, [40] * 3, segment_bytes=1)
    rot_all(tmp_path)
    [closed] = segment_files(tmp_path)[segments(tmp_path)[-2]]
    closed.write_bytes(bytes(closed.stat().st_size))
    left = closed.read_bytes()
    stale(tmp_path / "end", earlier)
    # It was durable as there is one behind it, but nothing says where its groups ended.
    with pytest.raises(CorruptLogError, match="restore the log from a copy, or remove it and dump the source again"):
        opened(tmp_path)
    assert closed.read_bytes() == left


@pytest.mark.parametrize("rot", [None, rot_body, rot_header])
@pytest.mark.parametrize("unreadable", UNREADABLE.values(), ids=UNREADABLE)
def test_an_end_that_cannot_be_read_is_named_and_the_log_is_as_without_it_once_it_is_removed(
    unreadable: Callable[[Path, bytes], None], rot: Callable[[Path], list[int]] | None, tmp_path: Path
) -> None:
    earlier = filled_beyond(tmp_path)
    before = read(tmp_path)
    lost = [] if rot is None else rot(tmp_path)
    unreadable(tmp_path / "end", earlier)
    content = last_file(tmp_path).read_bytes()
    for _ in range(2):
        with pytest.raises(CorruptLogError, match="remove that file and start the writer"):
            opened(tmp_path)
        with pytest.raises(CorruptLogError, match="remove that file and start the writer"):
            LocalLogReader(tmp_path).end()
    assert last_file(tmp_path).read_bytes() == content
    (tmp_path / "end").unlink()
    with opened(tmp_path) as writer:
        assert writer.end().sequence == before[-1].header.sequence - len(lost)
    assert [group.header for group in read(tmp_path)] == [group.header for group in before[: len(before) - len(lost)]]


@settings(max_examples=60, deadline=None)
# Bytes are missing from a group, and the whole one behind it lies where its body should be.
@example(counts=[10, 1], known=0, how=3, where=0.25, seed=0, segment_bytes=1 << 26)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    known=st.integers(0, 11),
    how=st.integers(0, len(DAMAGES) - 1),
    where=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 999),
    segment_bytes=st.sampled_from((1, 5_000, 1 << 26)),
)
def test_with_an_end_of_any_earlier_group_no_more_is_cut_than_damage_at_the_end(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    known: int,
    how: int,
    where: float,
    seed: int,
    segment_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("stale")
    known %= len(counts)
    filled(folder, counts[:known], segment_bytes=segment_bytes)
    earlier, durable = (folder / "end").read_bytes(), LocalLogReader(folder).end()
    for count in counts[known:]:
        filled(folder, [count], segment_bytes=segment_bytes)
    before = read(folder)
    path = last_file(folder)
    content = path.read_bytes()
    whole = {number: content[start:stop] for number, (start, _, stop) in frame_places(path).items()}
    damage(path, how, where, seed)
    left = path.read_bytes() if path.exists() else b""
    of_an_earlier_group(folder / "end", earlier)
    try:
        with opened(folder, segment_bytes=segment_bytes) as writer:
            end = without_epoch(writer.end())
            append(writer, 1)
    except (CorruptLogError, LogFormatError):
        # Nothing of it is left, or too little to tell what it was: refused by name.
        assert len(segments(folder)) < 2
        return
    assert end.sequence >= durable.sequence
    # What is there is what was there, then nothing: a group is whole, a gap in its place, or behind the end.
    after = read_mended(folder)
    for old, new in zip(before[: end.sequence + 1], after, strict=False):
        assert new.header.lost is not None or (new.header, rows_of(new)) == (old.header, rows_of(old))
    assert verify_log(LocalLogReader(folder)).is_whole
    assert end == (EMPTY_END if end.sequence < 0 else without_epoch(end_after(after[end.sequence].header)))
    is_cut = {number for number in whole if number > end.sequence}
    assert not any(whole[number] in left for number in is_cut)


def read_mended(folder: Path) -> list[StoredGroup]:
    """All of it, once what a reader meets is mended."""
    mend(folder)
    return read(folder)
