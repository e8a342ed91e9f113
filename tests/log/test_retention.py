"""The oldest segments go by age and size, never what a reader has yet to read, and what is left has no hole."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from log.appending import append
from log.test_local_log import filled, read_ids, run_child

from deltaworks import operate
from deltaworks.config import Config, ConfigError, LocalLogConfig, load
from deltaworks.log.audit import audit_log
from deltaworks.log.change_log import OffsetRetiredError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.retention import Closed, retire, to_retire
from deltaworks.log.segment_file import segments
from deltaworks.log.verify import verify_log
from deltaworks.store.load import load as load_log
from deltaworks.testing.faults import fail_at

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
NOTHING = LocalLogConfig(keep_bytes=0)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def closed(*ages_h: float) -> list[Closed]:
    """Segments of ten groups and 100 bytes."""
    return [
        Closed(first=10 * number, last=10 * number + 9, bytes=100, newest_at=NOON - timedelta(hours=age))
        for number, age in enumerate(ages_h)
    ]


@pytest.mark.parametrize(
    ("settings", "read_up_to", "gone"),
    [
        (LocalLogConfig(), 99, 0),
        (LocalLogConfig(keep_hours=5), 99, 2),
        (LocalLogConfig(keep_hours=5), 18, 1),
        (LocalLogConfig(keep_hours=5), -1, 0),
        (LocalLogConfig(keep_bytes=250), 99, 2),
        (LocalLogConfig(keep_bytes=0), 99, 4),
        (LocalLogConfig(keep_bytes=0), 29, 3),
        (LocalLogConfig(keep_hours=8.5, keep_bytes=250), 99, 2),
        (LocalLogConfig(max_hours=5), -1, 2),
        (LocalLogConfig(max_bytes=250), -1, 2),
        (LocalLogConfig(keep_hours=1, max_hours=7.5), 9, 1),
        (LocalLogConfig(keep_hours=1, max_hours=5), -1, 2),
    ],
)
def test_age_size_and_the_slowest_reader_decide(settings: LocalLogConfig, read_up_to: int, gone: int) -> None:
    found = closed(9, 7, 4, 2)
    chosen = to_retire(found, settings, total_bytes=450, read_up_to=read_up_to, now=NOON)
    assert chosen == found[:gone]


@given(
    ages=st.lists(st.floats(0, 100), max_size=8),
    keep_hours=st.none() | st.floats(0.1, 100),
    keep_bytes=st.none() | st.integers(0, 1_000),
    read_up_to=st.integers(-1, 90),
)
def test_without_a_maximum_nothing_unread_goes_and_what_stays_is_the_newest_part(
    ages: list[float], keep_hours: float | None, keep_bytes: int | None, read_up_to: int
) -> None:
    found = closed(*sorted(ages, reverse=True))
    settings = LocalLogConfig(keep_hours=keep_hours, keep_bytes=keep_bytes)
    total = 100 * len(found) + 30
    chosen = to_retire(found, settings, total_bytes=total, read_up_to=read_up_to, now=NOON)
    assert chosen == found[: len(chosen)]
    assert all(segment.last <= read_up_to for segment in chosen)
    if keep_hours is None and keep_bytes is not None:
        assert not chosen or total - 100 * len(chosen) >= keep_bytes


def test_a_maximum_below_what_is_to_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="max_hours is less than keep_hours"):
        LocalLogConfig(keep_hours=5, max_hours=4)


def test_the_log_goes_on_without_its_oldest_segments(tmp_path: Path) -> None:
    filled(tmp_path, 12, segment_bytes=4_000)
    reader, firsts = LocalLogReader(tmp_path), segments(tmp_path)
    assert len(read_ids(tmp_path)) == 12
    read_up_to = firsts[2] - 1
    done = retire(tmp_path, NOTHING, read_up_to={"app a": 99, "lake": read_up_to}, now=NOON)
    assert (done.segments, done.oldest_sequence, done.left_behind) == (2, firsts[2], [])
    # A reader goes on after what it has read, and one that is behind is told, also by an old reader object.
    for each in (reader, LocalLogReader(tmp_path)):
        assert [group.header.sequence for group in each.read(after_sequence=read_up_to)] == list(range(firsts[2], 12))
        with pytest.raises(OffsetRetiredError, match=r"keeps groups from \d+ on.*run `deltaworks log begin"):
            list(each.read(after_sequence=-1))
        oldest = each.oldest()
        assert oldest is not None
        assert oldest.sequence == firsts[2]
    with LocalLogWriter.open(tmp_path, segment_bytes=4_000) as writer:
        assert writer.end().sequence == 11
        append(writer, [12])
    assert verify_log(reader).groups == audit_log(reader, hop="log").up_to + 1 - firsts[2] == 13 - firsts[2]


def test_the_newest_visible_group_stays_whatever_is_asked(tmp_path: Path) -> None:
    filled(tmp_path, 5, segment_bytes=1)
    done = retire(tmp_path, LocalLogConfig(max_bytes=1, max_hours=0.001), read_up_to={}, now=datetime.now(UTC))
    assert (done.segments, done.oldest_sequence) == (4, 4)
    with LocalLogWriter.open(tmp_path) as writer:
        assert writer.end().sequence == 4


def test_who_is_left_behind_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 5, segment_bytes=1)
    read_up_to = {"app slow": 1, "lake": 4}
    assert retire(tmp_path, NOTHING, read_up_to=read_up_to, now=LONG_AGO).segments == 2
    done = retire(tmp_path, LocalLogConfig(max_bytes=1), read_up_to=read_up_to, now=LONG_AGO)
    assert (done.segments, done.left_behind) == (2, ["app slow"])


@pytest.mark.parametrize("step", ["log.before_remove", "log.after_remove"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_kill_while_segments_are_removed_leaves_a_log_without_a_hole(tmp_path: Path, step: str, after: int) -> None:
    filled(tmp_path, 6, segment_bytes=1)
    child = run_child(
        tmp_path,
        f"""
        from datetime import UTC, datetime
        from deltaworks.config import LocalLogConfig
        from deltaworks.log.retention import retire
        kill_at({step!r}, after={after})
        retire(folder, LocalLogConfig(keep_bytes=0), read_up_to={{"lake": 4}}, now=datetime.now(UTC))
        """,
    )
    assert child.returncode == -9
    removed = after + (step == "log.after_remove")
    assert read_ids(tmp_path, after_sequence=removed - 1) == [[number] for number in range(removed, 6)]
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as writer:
        append(writer, [6])
    assert retire(tmp_path, NOTHING, read_up_to={"lake": 4}, now=NOON).oldest_sequence == 5
    assert read_ids(tmp_path, after_sequence=4) == [[5], [6]]


def test_a_disk_that_refuses_a_removal_costs_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 4, segment_bytes=1)
    with fail_at("log.before_remove", OSError("injected")), pytest.raises(OSError, match="injected"):
        retire(tmp_path, NOTHING, read_up_to={"lake": 3}, now=NOON)
    assert len(read_ids(tmp_path)) == 4


def test_readers_never_fail_while_what_they_have_read_is_removed(tmp_path: Path) -> None:
    seen = -1
    reader = LocalLogReader(tmp_path)
    filled(tmp_path, 1, segment_bytes=1)
    failures: list[BaseException] = []

    def remove() -> None:
        try:
            while seen < 199:
                retire(tmp_path, NOTHING, read_up_to={"lake": seen}, now=NOON)
        except BaseException as error:  # shown by the test
            failures.append(error)

    remover = threading.Thread(target=remove)
    remover.start()
    with LocalLogWriter.open(tmp_path, segment_bytes=1) as writer:
        for number in range(1, 200):
            append(writer, [number])
            for group in reader.read(after_sequence=seen):
                seen = group.header.sequence
            assert next(header.sequence for header in reader.headers_backwards()) == number
    remover.join()
    assert failures == []
    assert seen == 199
    assert len(segments(tmp_path)) < 200


# Over a whole configuration.


def config_of(folder: Path, **log: object) -> Config:
    path = folder / "deltaworks.yaml"
    source = {"kind": "postgres", "dsn": "none", "tables": ["movie"], "log": {"kind": "local", **log}}
    path.write_text(yaml.safe_dump({"sources": {"studio": source}}))
    return load(path, environment={})


def test_the_lake_holds_back_what_it_has_not_loaded(tmp_path: Path) -> None:
    config = config_of(tmp_path, keep_bytes=0)
    folder = config.log_folder("studio")
    filled(folder, 5, segment_bytes=1)
    assert operate.read_up_to(config, "studio") == {"lake": -1}
    assert operate.retire_log(config, "studio").segments == 0
    with operate.open_lake(config) as lake:
        load_log(lake, LocalLogReader(folder), log="studio", up_to_sequence=2)
    assert operate.read_up_to(config, "studio") == {"lake": 2}
    assert operate.retire_log(config, "studio").oldest_sequence == 3
    # The lake goes on from there.
    assert operate.load(config, "studio").to_offset == 5


def test_nothing_is_removed_unless_it_is_configured(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    filled(config.log_folder("studio"), 5, segment_bytes=1)
    operate.load(config, "studio")
    assert operate.retire_log(config, "studio").oldest_sequence == 0
    assert len(read_ids(config.log_folder("studio"))) == 5


def test_the_service_does_it_by_itself(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_bytes=1)
    folder = config.log_folder("studio")
    filled(folder, 5, segment_bytes=1)
    with operate.retiring(config, "studio"):
        pass
    assert segments(folder) == [4]


def test_a_setting_that_makes_no_sense_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_hours"):
        config_of(tmp_path, keep_hours=0)
