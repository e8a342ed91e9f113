"""A damaged log is mended: whatever is whole is kept, the rest is a named gap, and everything around it follows."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log.appending import TABLE

from deltaworks.capture.proof import Proof
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log import find
from deltaworks.log.audit import audit_hop, audit_log
from deltaworks.log.change_log import CorruptLogError, Group, GroupHeader, LogFormatError, StoredGroup
from deltaworks.log.damage import note_suspect
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.mending import LocalMending
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment_file import segment_files, segments
from deltaworks.log.taken import Taken
from deltaworks.log.verify import verify_log
from deltaworks.position import Lsn

TESTS = Path(__file__).parent.parent


def append(writer: LocalLogWriter, count: int, *, is_partial: bool = False, goes_on: bool = False) -> None:
    """Append a group with a proof: `count` changes of one transaction, or a part of one."""
    end = writer.end()
    position = Lsn(end.position.value + 10)
    rows = {
        "_op": ["c"] * count,
        "_commit": [position.value] * count,
        "_ordinal": list(range(end.offset, end.offset + count)),
        "_txid": [position.value] * count,
        "_committed_at": [datetime(2026, 1, 1, 0, end.sequence // 7 % 60, tzinfo=UTC)] * count,
        "_unchanged": [None] * count,
        "_old_key": [None] * count,
        "_as_text": [None] * count,
        "id": list(range(end.offset, end.offset + count)),
    }
    batches = ()
    if count:
        batches = (ChangeBatch(TABLE, pa.RecordBatch.from_pydict(rows, schema=change_schema(TABLE))),)
    proof = Proof.of(batches, after=end.chain, transaction_count=None if is_partial or goes_on else int(count > 0))
    at = end.position if is_partial else position
    writer.append(
        Group(
            batches=batches,
            position=at,
            previous_position=end.position,
            transaction_count=int(count > 0),
            proof=proof,
            progress={"groups": end.sequence + 2},
            is_partial=is_partial,
        )
    )


def filled(folder: Path, counts: Sequence[int], *, segment_bytes: int = 5_000) -> None:
    with LocalLogWriter.open(folder, segment_bytes=segment_bytes) as writer:
        for number, count in enumerate(counts):
            # Every fourth transaction comes in three parts.
            if number % 4 == 3:
                append(writer, count, is_partial=True)
                append(writer, count, is_partial=True, goes_on=True)
            append(writer, count, goes_on=number % 4 == 3)


def read(folder: Path, after: int = -1) -> list[StoredGroup]:
    return list(LocalLogReader(folder).read(after_sequence=after))


def read_to_damage(folder: Path) -> tuple[list[StoredGroup], str | None]:
    seen: list[StoredGroup] = []
    try:
        seen += LocalLogReader(folder).read(after_sequence=-1)
    except CorruptLogError as error:
        return seen, str(error)
    return seen, None


def rows_of(group: StoredGroup) -> list[list[object]]:
    return [batch.rows.to_pylist() for batch in group.batches]


def place_of(header: GroupHeader) -> tuple[object, ...]:
    return header.sequence, header.offset, header.next_offset, header.position, header.is_partial


def mend(folder: Path) -> LocalMending:
    """Do what capture does when it starts: look at what readers met, until nothing is left."""
    with LocalLogWriter.open(folder) as writer:
        mending = LocalMending(folder, end_segment=writer.end_segment)
        for _ in range(20):
            mending.look_through()
            if not mending.suspects():
                return mending
            mending.heed()
            if mending.suspects():
                append(writer, 1)
    raise AssertionError(f"still suspect: {mending.suspects()}")


# What happens to a file. Each takes its bytes and says what is left; `where` is between 0 and 1.


def flip(content: bytearray, where: float, chance: random.Random) -> bytearray:
    content[int(where * len(content))] ^= chance.randrange(1, 256)
    return content


def scramble(content: bytearray, where: float, chance: random.Random) -> bytearray:
    start = int(where * len(content))
    for at in range(start, min(len(content), start + chance.randrange(1, 4_000))):
        content[at] = chance.randrange(256)
    return content


def truncate(content: bytearray, where: float, _: random.Random) -> bytearray:
    return content[: int(where * len(content))]


def remove(content: bytearray, where: float, chance: random.Random) -> bytearray:
    start = int(where * len(content))
    del content[start : start + chance.randrange(1, 3_000)]
    return content


def remove_a_frame(content: bytearray, where: float, chance: random.Random) -> bytearray:
    starts = [at for at in range(len(content)) if content[at : at + 4] == b"DWLG"]
    if len(starts) < 2:
        return flip(content, where, chance)
    at = int(where * (len(starts) - 1))
    del content[starts[at] : starts[at + 1]]
    return content


def unlink(content: bytearray, where: float, chance: random.Random) -> None:  # one of many
    return None


DAMAGES: Sequence[Callable[[bytearray, float, random.Random], bytearray | None]] = (
    flip,
    scramble,
    truncate,
    remove,
    remove_a_frame,
    unlink,
)


def damage(path: Path, how: int, where: float, seed: int) -> bool:
    before = path.read_bytes()
    if path.suffix == ".sealed" and how == 1 and where * len(before) < 8:
        # Where the number of its format and its end are damaged, nobody tells it from one of a newer version.
        where = 8.5 / len(before)
    after = DAMAGES[how](bytearray(before), where, random.Random(seed))
    if after is None:
        path.unlink()
        return True
    path.write_bytes(after)
    return bytes(after) != before


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=8, max_size=20),
    is_sealed=st.booleans(),
    hits=st.lists(
        st.tuples(
            st.integers(0, len(DAMAGES) - 1),
            st.floats(0, 1, exclude_max=True),
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 999),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_whatever_is_whole_is_kept_and_the_rest_is_a_named_gap(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    is_sealed: bool,
    hits: list[tuple[int, float, float, int]],
) -> None:
    folder = tmp_path_factory.mktemp("mended")
    filled(folder, counts)
    before, known = read(folder), LocalLogReader(folder)
    # A reader that knows where every group stands.
    assert len(list(known.headers_backwards())) == len(before)
    if is_sealed:
        seal_closed(folder, level=1)
    closed = segments(folder)[:-1]
    if not closed:
        return
    is_damaged = False
    for how, which, where, seed in hits:
        [path, *_] = segment_files(folder).get(closed[int(which * len(closed))], [None])
        # What is missing at the log's beginning was retired.
        if path is not None and not (how == len(DAMAGES) - 1 and int(path.stem) == 0):
            is_damaged = damage(path, how, where, seed) or is_damaged

    # Before: nobody is given anything but what was written, and whoever gets to the damage is told so by name.
    seen, error = read_to_damage(folder)
    assert error is None or is_damaged
    assert len(seen) == len(before) if error is None else "deltaworks log mend" in error
    for old, new in zip(before, seen, strict=False):
        assert (old.header, rows_of(old)) == (new.header, rows_of(new))

    mending = mend(folder)

    after = read(folder)[: len(before)]
    assert [group.header.sequence for group in after] == list(range(len(before)))
    lost = {number for each in mending.lost() for number in range(each.first, each.last + 1)}
    for old, new in zip(before, after, strict=True):
        if new.header.lost is None:
            assert (old.header, rows_of(old)) == (new.header, rows_of(new))
            assert old.header.sequence not in lost
        else:
            assert new.batches == ()
            assert old.header.sequence in lost
    # Whatever is lost is said, and every place around it is as it was.
    assert sum(each.changes for each in mending.lost()) >= sum(
        old.header.next_offset - old.header.offset for old in before if old.header.sequence in lost
    )
    assert len(list(known.read(after_sequence=-1))) >= len(before)
    assert [header.sequence for header in known.headers_backwards()][-len(before) :] == list(range(len(before)))[::-1]
    for old in before:
        found = find.at_position(known, old.header.position)
        assert found.position >= old.header.position
        if old.header.next_offset > old.header.offset:
            assert find.at_offset(known, old.header.offset).next_offset > old.header.offset
    verification = verify_log(known)
    assert verification.is_whole, verification.faults
    assert {fault.sequence for fault in verification.lost} == lost
    assert audit_log(known, hop="log").losses == ()
    # A hop that had all of it, one that was within it, and one that comes afterwards: none is blamed.
    for cut in (0, len(before) // 2, len(before)):
        head = [batch for group in before[:cut] for batch in group.batches]
        tail = [batch for group in after[cut:] for batch in group.batches]
        spans = [
            Taken.of(head, after=-1, up_to=cut - 1),
            Taken.of(tail, after=cut - 1, up_to=len(before) - 1),
        ]
        assert audit_hop(known, [span for span in spans if span.up_to > span.after], hop="lake").losses == ()
    # What was damaged is there still, and a mended log can be sealed and mended again.
    assert not lost or list((folder / "damaged").glob("*.lost"))
    seal_closed(folder, level=1)
    assert [place_of(group.header) for group in read(folder)[: len(before)]] == [
        place_of(group.header) for group in after
    ]


DEATHS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from log.test_mending import mend, read, read_to_damage, rotten, rows_of
from deltaworks.testing.faults import kill_at

STEPS = (
    "before_mend_write", "after_mend_write", "before_set_aside", "after_set_aside", "before_mend_rename",
    "after_mend_rename", "after_mend_unlink",
)
for kind in ("plain", "sealed", "missing"):
    for step in STEPS:
        folder = Path({folder!r}) / kind / step
        whole, victims = rotten(folder, kind)
        child = os.fork()
        if child == 0:
            kill_at("log." + step)
            mend(folder)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kind, step, status)
        # Readers get what was written, or are told; never less than what is whole before the damage.
        seen, _ = read_to_damage(folder)
        assert len(seen) >= victims[0], (kind, step)
        for old, new in zip(whole, seen):
            assert new.header.lost is not None or rows_of(old) == rows_of(new), (kind, step)
        mending = mend(folder)
        after = read(folder)[: len(whole)]
        lost = [group.header.sequence for group in after if group.header.lost is not None]
        assert lost == victims, (kind, step, lost, victims)
        # Each loss is owed once, and the file is there still.
        assert [(each.first, each.last) for each in mending.owed()] == [(victims[0], victims[-1])], (kind, step)
        asides = [path for path in (folder / "damaged").iterdir() if path.suffix in (".segment", ".sealed")]
        assert len(asides) == (kind != "missing"), (kind, step, asides)
        assert not list(folder.glob("*.mending")), (kind, step)
print("done")
"""


def rotten(folder: Path, kind: str) -> tuple[list[StoredGroup], list[int]]:
    """A log with damage in its middle: what was in it, and the groups that are lost."""
    filled(folder, [40] * 16)
    whole, firsts = read(folder), segments(folder)
    first, following = firsts[2], firsts[3]
    if kind == "sealed":
        seal_closed(folder, level=1)
    [path] = segment_files(folder)[first]
    if kind == "missing":
        path.unlink()
        return whole, list(range(first, following))
    content = bytearray(path.read_bytes())
    if kind == "sealed":
        # Nothing of its one block can be decompressed.
        content[8:40] = bytes(32)
        lost = list(range(first, following))
    else:
        content[20] ^= 1
        lost = [first]
    path.write_bytes(content)
    return whole, lost


def test_a_mending_that_dies_anywhere_is_done_again_and_owes_each_loss_once(tmp_path: Path) -> None:
    code = DEATHS.format(tests=str(TESTS), folder=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith("done\n"), child.stdout


def test_a_plain_file_stands_in_for_the_damaged_sealed_one_and_nothing_is_lost(tmp_path: Path) -> None:
    filled(tmp_path, [40] * 16)
    whole = read(tmp_path)
    copies = {path.name: path.read_bytes() for path in tmp_path.glob("*.segment")}
    seal_closed(tmp_path, level=1)
    first = segments(tmp_path)[1]
    # As a crash within sealing leaves it: both are there, and now either may rot.
    plain = tmp_path / f"{first:020d}.segment"
    sealed = plain.with_suffix(".sealed")
    plain.write_bytes(copies[plain.name])
    plain.write_bytes(bytes(byte ^ 1 if at == 50 else byte for at, byte in enumerate(plain.read_bytes())))
    mending = mend(tmp_path)
    assert mending.lost() == []
    assert rows_and_headers(read(tmp_path)[: len(whole)]) == rows_and_headers(whole)
    assert not plain.exists()
    # Of two that are damaged, what is whole in either is kept.
    sealed.write_bytes(bytes(8 + len(sealed.read_bytes()) // 2))
    plain.write_bytes(copies[plain.name][: len(copies[plain.name]) - 10])
    mending = mend(tmp_path)
    (lost,) = mending.lost()
    assert lost.last == segments(tmp_path)[2] - 1
    assert lost.tables == ("public.movie",)
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == sorted(
        [f"{plain.stem}.segment", f"{plain.stem}.2.segment", sealed.name, f"{lost.first:020d}-{lost.last:020d}.lost"]
    )


def rows_and_headers(groups: Sequence[StoredGroup]) -> list[tuple[GroupHeader, list[list[object]]]]:
    return [(group.header, rows_of(group)) for group in groups]


def test_damage_in_the_segment_that_is_written_to_is_mended_once_that_is_closed(tmp_path: Path) -> None:
    filled(tmp_path, [5] * 6, segment_bytes=1 << 26)
    [path] = tmp_path.glob("*.segment")
    content = bytearray(path.read_bytes())
    content[content.index(b"ARROW") if b"ARROW" in content else 1_500] ^= 1
    with LocalLogWriter.open(tmp_path) as writer:
        path.write_bytes(content)
        reader = LocalLogReader(tmp_path)
        with pytest.raises(CorruptLogError):
            list(reader.read(after_sequence=-1))
        mending = LocalMending(tmp_path, end_segment=writer.end_segment)
        assert not mending.heed()
        assert mending.suspects()
        append(writer, 1)
        assert mending.heed()
        assert not mending.suspects()
        assert len(mending.owed()) == 1
        assert [group.header.sequence for group in reader.read(after_sequence=-1)] == list(
            range(writer.end().sequence + 1)
        )


@pytest.mark.parametrize("bit", [1 << bit for bit in range(32)])
def test_a_damaged_format_number_of_a_sealed_file_is_mended_and_nothing_is_lost(tmp_path: Path, bit: int) -> None:
    filled(tmp_path, [20] * 10, segment_bytes=10_000)
    whole = read(tmp_path)
    seal_closed(tmp_path, level=1)
    path = min(tmp_path.glob("*.sealed"))
    content = path.read_bytes()
    path.write_bytes(content[:4] + (int.from_bytes(content[4:8], "little") ^ bit).to_bytes(4, "little") + content[8:])
    with pytest.raises(CorruptLogError, match="deltaworks log mend"):
        read(tmp_path)
    mending = mend(tmp_path)
    assert mending.lost() == []
    assert rows_and_headers(read(tmp_path)[: len(whole)]) == rows_and_headers(whole)


def test_a_sealed_file_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    filled(tmp_path, [20] * 10, segment_bytes=10_000)
    seal_closed(tmp_path, level=1)
    path = min(tmp_path.glob("*.sealed"))
    newer = path.read_bytes()
    newer = newer[:4] + (2).to_bytes(4, "little") + newer[8:-4] + b"DWS2"
    path.write_bytes(newer)
    with pytest.raises(LogFormatError, match="format 2; this version reads 1: upgrade"):
        read(tmp_path)
    with pytest.raises(LogFormatError):
        mend(tmp_path)
    assert path.read_bytes() == newer


def test_a_false_alarm_changes_nothing(tmp_path: Path) -> None:
    filled(tmp_path, [20] * 12)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.segment")}
    with LocalLogWriter.open(tmp_path):
        mending = LocalMending(tmp_path)
        note_suspect(tmp_path, 2, "nothing")
        assert not mending.heed()
    assert mending.suspects() == []
    assert mending.lost() == []
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.segment")} == before


def test_a_reader_goes_on_behind_a_group_that_it_read_before_it_was_lost_with_the_next_ones(tmp_path: Path) -> None:
    filled(tmp_path, [3] * 12, segment_bytes=1 << 20)
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as writer:
        append(writer, 1)
    reader = LocalLogReader(tmp_path)
    taken: list[StoredGroup] = []
    for group in reader.read(after_sequence=-1):
        taken.append(group)
        if len(taken) == 5:
            break
    first, *_ = segments(tmp_path)
    [path] = segment_files(tmp_path)[first]
    # Not a header is left, so the places of all but the bounds of the gap are guesses.
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptLogError):
        list(reader.read(after_sequence=4))
    mend(tmp_path)
    groups = list(reader.read(after_sequence=4))
    assert groups[0].header.sequence == 5
    assert groups[0].header.lost is not None
    assert groups[0].header.may_follow(taken[-1].header.position)
