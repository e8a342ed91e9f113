"""A place in a long log is found by halves: by position, by time, also where capture had fallen behind."""

import random
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from deltaworks.log import local_reader
from deltaworks.log.change_log import OffsetRetiredError
from deltaworks.log.find import CLOCK_MARGIN
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment_file import segments
from deltaworks.log.until import LogUntil, last_group_at, position_before
from deltaworks.position import Lsn
from deltaworks.testing.changes import EPOCH, Feed, create, read, table_schema

TABLE = table_schema("movie", "id", id=(pa.int64(), "bigint", False))
GROUPS = 240


def filled(folder: Path, *, seed: int) -> list[tuple[datetime, int]]:
    """A log that was appended long after its changes were committed; when each was, and its position.

    Commits are in order but for the margin, and between them are groups of a dump and groups without changes.
    """
    chance, found = random.Random(seed), []
    with LocalLogWriter.open(folder, segment_bytes=1) as writer:
        feed = Feed(writer)
        for number in range(GROUPS):
            moment = EPOCH + timedelta(seconds=20 * number + chance.uniform(0, CLOCK_MARGIN.total_seconds()))
            kind = chance.random()
            if kind < 0.1:
                feed.commit(read(TABLE, id=number), committed_at=EPOCH + timedelta(days=9))
            elif kind < 0.2:
                feed.commit()
            else:
                found.append((moment, feed.commit(create(TABLE, id=number), committed_at=moment)))
    return found


@pytest.mark.parametrize("is_sealed", [False, True])
def test_the_first_change_since_a_moment_is_found_as_by_looking_at_each(tmp_path: Path, *, is_sealed: bool) -> None:
    committed = filled(tmp_path, seed=is_sealed)
    if is_sealed:
        seal_closed(tmp_path, level=1)
    log = LocalLogReader(tmp_path)
    for number in range(-40, 20 * GROUPS + 100, 211):
        moment = EPOCH + timedelta(seconds=number)
        first = next((position for at, position in committed if at >= moment), None)
        expected = Lsn(first - 1) if first is not None else log.end().position
        assert position_before(log, moment) == expected
        if number % 5 == 0:
            # A reader that does not know where groups stand.
            assert position_before(LogUntil(log, sequence=GROUPS - 1), moment) == expected


def test_few_segments_of_many_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = filled(tmp_path, seed=2)
    seal_closed(tmp_path, level=1)
    seen: set[int] = set()
    opened = local_reader.opened

    def counting(folder: Path, first: int) -> object:
        seen.add(first)
        return opened(folder, first)

    monkeypatch.setattr(local_reader, "opened", counting)
    for moment, position in committed[::37]:
        seen.clear()
        position_before(LocalLogReader(tmp_path), moment)
        assert len(seen) < 45, f"of {len(segments(tmp_path))} segments"
        seen.clear()
        last_group_at(LocalLogReader(tmp_path), Lsn(position))
        assert len(seen) < 15


def test_a_moment_that_was_retired_is_named(tmp_path: Path) -> None:
    committed = filled(tmp_path, seed=3)
    for first in segments(tmp_path)[:120]:
        next(tmp_path.glob(f"{first:020d}.*")).unlink()
    with pytest.raises(OffsetRetiredError, match="keeps groups from 120"):
        position_before(LocalLogReader(tmp_path), committed[0][0])
    assert position_before(LocalLogReader(tmp_path), committed[-1][0] - CLOCK_MARGIN) > Lsn(0)
