"""A log that is taken from a writer which still has its lock: the old writer can do no harm."""

from pathlib import Path

import pytest
from log.appending import append

from deltaworks import faults
from deltaworks.log.change_log import FencedError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.takeover import take_over


def ids(folder: Path) -> list[int]:
    return [
        row["id"]
        for group in LocalLogReader(folder).read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
    ]


def test_writer_that_lost_its_log_is_refused_and_the_new_one_goes_on(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path) as old:
        append(old, [1])
        take_over(tmp_path)
        with LocalLogWriter.open(tmp_path) as new:
            append(new, [2])
            with pytest.raises(FencedError, match="its epoch is now"):
                append(old, [3])
            append(new, [4])
            assert new.epoch > old.epoch
    assert ids(tmp_path) == [1, 2, 4]


@pytest.mark.parametrize("step", ["log.before_write", "log.after_write", "log.before_fsync", "log.after_fsync"])
def test_append_that_was_under_way_when_the_log_was_lost_is_not_acknowledged_and_harms_nobody(
    tmp_path: Path, step: str
) -> None:
    with LocalLogWriter.open(tmp_path) as old:
        append(old, [1])
        new: list[LocalLogWriter] = []

        def lose() -> None:
            faults.disarm()
            take_over(tmp_path)
            new.append(LocalLogWriter.open(tmp_path))
            append(new[0], [2])

        faults.arm(step, lose)
        with pytest.raises(FencedError):
            append(old, [3])
        append(new[0], [4])
        new[0].close()
    # Whether the group under way is in the log depends on the moment; half of it never is.
    assert ids(tmp_path) in ([1, 2, 4], [1, 3, 2, 4])


def test_segment_that_the_new_writer_began_is_not_written_by_the_old_one(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as old:
        append(old, [1])
        take_over(tmp_path)
        with LocalLogWriter.open(tmp_path, segment_bytes=1) as new:
            append(new, [2])
            with pytest.raises(FencedError):
                append(old, [3])
    assert ids(tmp_path) == [1, 2]


def test_reader_goes_on_over_a_takeover(tmp_path: Path) -> None:
    reader = LocalLogReader(tmp_path)
    with LocalLogWriter.open(tmp_path) as old:
        append(old, [1])
        assert reader.end().sequence == 0
        take_over(tmp_path)
        with LocalLogWriter.open(tmp_path) as new:
            append(new, [2])
            assert reader.wait(after_sequence=0, timeout_s=5)
            assert [group.header.sequence for group in reader.read(after_sequence=0)] == [1]
