"""What is archived reads back as it was, nothing is ever overwritten, and nothing goes here before it is there."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from log.appending import append
from log.archiving import SEGMENT_BYTES, cached_bytes, config_of, damage, fill, ids, keys, log_in, retire, run, version  # noqa: F401  a fixture
from log.test_local_log import run_child
from process.film_app import FILM, film_app
from process.material import Feed, TableSink, create, delete, update
from servers.object_store import (
    Bucket,
    answering,
    forgetting_who_was_first,
    new_bucket,
    s3_server,
)

from deltaworks import operate
from deltaworks.errors import RetryableError
from deltaworks.log.archive.manifest import NAME, Archived, add_archived, read_manifest
from deltaworks.log.archive.place import ArchiveConflictError, CorruptArchiveError
from deltaworks.log.archive.standing import ArchiveStatus
from deltaworks.log.change_log import ArchivedSegmentGoneError, CorruptLogError, OffsetRetiredError
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import LocalLog, log_of
from deltaworks.log.segment_file import segment_files, segments
from deltaworks.object_store import ConditionalWriteError, ObjectStoreDeniedError, ObjectStoreDownError
from deltaworks.process.runner import Runner
from deltaworks.testing.postgres import free_port


@pytest.fixture
def log(tmp_path: Path, bucket: Bucket) -> LocalLog:
    """A log of twelve groups in several segments, with an archive that is empty yet."""
    log = log_in(tmp_path, bucket)
    fill(log, 12)
    return log


@pytest.mark.parametrize("seal", [True, False])
def test_what_was_archived_and_removed_here_is_read_as_before(tmp_path: Path, bucket: Bucket, *, seal: bool) -> None:
    log = log_in(tmp_path, bucket, seal=seal)
    fill(log, 12)
    reader, before = log.reader(), [group.header for group in log.reader().read(after_sequence=-1)]
    closed = segments(log.folder)[:-1]
    assert retire(log) == 0, "nothing is in the archive yet"
    assert [segment.first for segment in log.archive()] == closed
    assert log.archive() == [], "everything is there"
    assert {Path(segment.name).suffix for segment in read_manifest(log.folder).values()} == {
        ".sealed" if seal else ".segment"
    }
    assert retire(log) == len(closed)
    assert len(segments(log.folder)) == 1

    # An old reader and a new one, from the start, from within, and backwards.
    for each in (reader, log.reader()):
        assert [group.header for group in each.read(after_sequence=-1)] == before
        assert [group.header for group in each.read(after_sequence=closed[1])] == before[closed[1] + 1 :]
        assert list(each.headers_backwards()) == before[::-1]
        oldest = each.oldest()
        assert oldest is not None
        assert oldest.sequence == 0
    assert {f"deltaworks/studio/{path.name}" for path in log.cache.iterdir()} | {
        "deltaworks/.deltaworks/first-writer"
    } == set(bucket.objects())
    # The writer goes on, and who asks for the newest only fetches nothing.
    shutil.rmtree(log.cache)
    fill(log, 3, first=12)
    near = log.near_reader()
    assert [header.sequence for header in near.headers_backwards()][-1] == segments(log.folder)[0]
    with pytest.raises(OffsetRetiredError):
        list(near.read(after_sequence=-1))
    assert not log.cache.exists()
    assert ids(log) == list(range(15))


@pytest.mark.parametrize("step", ["archive.before_put", "archive.after_put", "archive.after_note"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_kill_at_any_step_costs_nothing_and_writes_nothing_twice(
    log: LocalLog, tmp_path: Path, bucket: Bucket, step: str, after: int
) -> None:
    child = run_child(
        log.folder,
        f"""
        from log.archiving import log_in
        from servers.object_store import Bucket
        kill_at({step!r}, after={after})
        log_in(Path({str(tmp_path)!r}), Bucket({bucket.endpoint!r}, {bucket.name!r})).archive()
        """,
    )
    assert child.returncode == -9, child.stderr
    written = {name: version(bucket, name) for name in bucket.objects()}
    closed = len(segments(log.folder)) - 1
    left = closed - after - (step == "archive.after_note")
    assert len(log.archive()) == left
    assert {name: version(bucket, name) for name in written} == written
    assert retire(log) == closed
    assert ids(log) == list(range(12))


def test_another_content_under_the_name_stops_the_archive_and_is_not_overwritten(
    log: LocalLog, tmp_path: Path, bucket: Bucket
) -> None:
    log.archive()
    retire(log)
    # Two writers under one name: another machine with the same configuration and other changes.
    other = log_in(tmp_path / "other", bucket)
    fill(other, 12, first=100)
    before = {name: version(bucket, name) for name in bucket.objects()}
    with pytest.raises(ArchiveConflictError, match=r"studio/0+\.sealed.*nothing was overwritten.*log\.archive\.prefix"):
        other.archive()
    assert {name: version(bucket, name) for name in bucket.objects()} == before
    status = other.archived()
    assert status is not None
    assert status.fault is not None
    assert status.fault.is_stopped
    assert retire(other) == 0, "what is not archived stays"
    assert (ids(log), ids(other)) == (list(range(12)), list(range(100, 112)))
    # The next step that the message names.
    moved = log_in(tmp_path / "other", bucket, prefix="another")
    assert len(moved.archive()) == len(segments(other.folder)) - 1
    assert moved.archived() is not None
    assert moved.archived().fault is None  # type: ignore[union-attr]  # looked at above


def test_two_that_archive_the_same_log_agree(log: LocalLog, tmp_path: Path, bucket: Bucket) -> None:
    first = log.archive()
    # The same log where nobody knows that it is archived: the list was lost with a power cut.
    (log.folder / NAME).unlink()
    assert log.archive() == first
    retire(log)
    # The list is lost when the segments are gone already: the next segment brings it back from the archive.
    (log.folder / NAME).unlink()
    with pytest.raises(OffsetRetiredError):
        ids(log)
    fill(log, 8, first=12)
    log.archive()
    assert ids(log) == list(range(20))
    assert list(read_manifest(log.folder))[: len(first)] == [segment.first for segment in first]


def test_two_at_the_same_time_write_every_segment_once(log: LocalLog, tmp_path: Path, bucket: Bucket) -> None:
    together = threading.Barrier(2)

    def archive(each: LocalLog) -> None:
        together.wait(timeout=60)
        # The store may refuse both of two that come at the same moment; the service tries again, and so do we.
        for _ in range(60):
            try:
                each.archive()
            except RetryableError:
                continue
            return
        pytest.fail(f"not archived after 60 tries: {each.archived()}")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(archive, [log, log_in(tmp_path, bucket)]))
    closed = segments(log.folder)[:-1]
    assert list(read_manifest(log.folder)) == closed
    assert len(bucket.objects()) == len(closed) + 1
    retire(log)
    assert ids(log) == list(range(12))


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    segment = [Archived(name=f"{first}.segment", first=first, last=first, bytes=1, sha256="00") for first in range(3)]
    add_archived(tmp_path, segment[0])
    add_archived(tmp_path, segment[1])
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-7])
    assert list(read_manifest(tmp_path)) == [0]
    add_archived(tmp_path, segment[2])
    assert list(read_manifest(tmp_path)) == [0, 2]


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_named(log: LocalLog, bucket: Bucket) -> None:
    log.archive()
    retire(log)
    reader = log.reader()
    everything = ids(log)
    list(reader.read(after_sequence=-1))
    for copy in log.cache.iterdir():
        damage(copy)
    for each in (reader, log.reader()):
        assert [group.header.sequence for group in each.read(after_sequence=-1)] == list(range(12))
    assert ids(log) == everything

    name, copy = "deltaworks/studio/00000000000000000000.sealed", log.cache / "00000000000000000000.sealed"
    damage(copy)
    client = bucket.client()
    client.put_object(Bucket=bucket.name, Key=name, Body=copy.read_bytes())
    with pytest.raises(CorruptArchiveError, match=rf"groups 0 to \d+ from 's3://{bucket.name}/{name}'"):
        list(reader.read(after_sequence=-1))
    client.delete_object(Bucket=bucket.name, Key=name)
    client.close()
    with pytest.raises(ArchivedSegmentGoneError, match=r"groups 0 to \d+.*that is gone.*run `deltaworks dump studio`"):
        list(log.reader().read(after_sequence=-1))


def test_a_segment_that_is_damaged_here_is_not_archived_as_if_it_were_sound(log: LocalLog, bucket: Bucket) -> None:
    first, second = sorted(log.folder.glob("*.segment"))[:2]
    damage(second)
    with pytest.raises(CorruptLogError, match=second.name):
        log.archive()
    assert list(read_manifest(log.folder)) == [int(first.stem)]
    status = log.archived()
    assert status is not None
    assert status.fault is not None
    assert status.fault.is_stopped
    assert retire(log) == 1
    assert not any(second.stem in name for name in bucket.objects())


@pytest.mark.parametrize("is_retired", [False, True])
def test_a_last_segment_that_is_lost_is_a_named_gap_behind_what_is_archived(
    log: LocalLog, bucket: Bucket, is_retired: bool
) -> None:
    append_in_one_segment(log)
    end = log.reader().end()
    log.archive()
    if is_retired:
        retire(log)
    first = segments(log.folder)[-1]
    (log.folder / f"{first:020d}.segment").unlink()
    with pytest.raises(CorruptLogError):
        log.writer()
    with log.writer(mends=True) as writer:
        assert (writer.end().sequence, writer.end().offset) == (end.sequence, end.offset)
        assert (writer.end().position, writer.end().progress) == (end.position, end.progress)
    headers = [group.header for group in log.reader().read(after_sequence=-1)]
    assert [header.sequence for header in headers] == list(range(end.sequence + 1))
    assert [header.sequence for header in headers if header.lost is not None] == list(range(first, end.sequence + 1))
    # Nothing was fetched to stay here but what the gap follows.
    assert not is_retired or segments(log.folder) == [first]


def append_in_one_segment(log: LocalLog) -> None:
    with LocalLogWriter.open(log.folder) as writer:
        writer.end_segment()
        for number in range(3):
            append(writer, [number])


def test_the_cache_stays_within_its_bound_and_old_copies_go_first(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, bucket, cache_bytes=2 * SEGMENT_BYTES, seal=False)
    fill(log, 12)
    log.archive()
    retire(log)
    reader = log.reader()
    for _ in range(2):
        for group in reader.read(after_sequence=-1):
            assert cached_bytes(log) <= 2 * SEGMENT_BYTES, group.header.sequence
    tiny = log_in(tmp_path, bucket, cache_bytes=0, seal=False)
    assert ids(tiny) == list(range(12))
    assert len(list(tiny.cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (forgetting_who_was_first, ConditionalWriteError, r"two writers.*leave log\.archive out"),
        (answering("501 Not Implemented", "NotImplemented"), ConditionalWriteError, "answers 'NotImplemented'"),
        (answering("403 Forbidden", "AccessDenied"), ObjectStoreDeniedError, r"'AccessDenied'; look at log\.archive"),
        (answering("503 Slow Down", "SlowDown"), ObjectStoreDownError, "answers 503 'SlowDown'; try again later"),
    ],
)
def test_a_store_that_will_not_do_is_named_and_the_log_keeps_its_segments(
    tmp_path: Path, change: Any, error: type[Exception], says: str
) -> None:
    with s3_server(change) as endpoint:
        log = log_in(tmp_path, new_bucket(endpoint, "will-not-do"))
        fill(log, 6)
        with pytest.raises(error, match=says):
            log.archive()
    assert retire(log) == 0
    status = log.archived()
    assert status is not None
    assert status.fault is not None
    assert status.fault.is_stopped == (error is not ObjectStoreDownError)
    assert (status.segments, status.behind_segments) == (0, len(segments(log.folder)) - 1)
    assert log.retire(read_up_to={"lake": 99}).unarchived == status.behind_segments


def test_an_archive_that_is_away_is_one_to_wait_for(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, Bucket(f"http://127.0.0.1:{free_port()}", bucket.name))
    fill(log, 12)
    with pytest.raises(ObjectStoreDownError, match=r"cannot reach 'http.*is log\.archive\.endpoint right"):
        log.archive()
    assert log.archived().fault is not None  # type: ignore[union-attr]  # it has an archive
    back = log_in(tmp_path, bucket)
    back.archive()
    assert back.archived().fault is None  # type: ignore[union-attr]
    retire(log)
    with pytest.raises(ObjectStoreDownError, match="cannot reach"):
        ids(log)
    assert ids(back) == list(range(12))
    missing = log_in(tmp_path / "more", Bucket(bucket.endpoint, "nobody-s"))
    fill(missing, 6)
    with pytest.raises(ObjectStoreDeniedError, match=r"'s3://nobody-s/deltaworks/.*'NoSuchBucket'"):
        missing.archive()


def test_a_maximum_removes_nothing_that_is_not_archived(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, bucket)
    fill(log, 12)
    settings = log.settings.model_copy(update={"keep_bytes": None, "max_bytes": 1})
    forced = LocalLog("studio", log.folder, settings, cache=log.cache)
    assert forced.retire(read_up_to={"lake": -1}).unarchived == len(segments(log.folder)) - 1
    log.archive()
    done = forced.retire(read_up_to={"lake": -1})
    assert (len(segments(log.folder)), done.left_behind, done.unarchived) == (1, [], 0)
    assert ids(log) == list(range(12)), "nobody is left behind by what is in the archive"


def test_a_kill_in_the_middle_of_a_fetch_leaves_nothing_that_is_read(
    log: LocalLog, tmp_path: Path, bucket: Bucket
) -> None:
    log.archive()
    retire(log)
    child = run_child(
        log.folder,
        f"""
        from log.archiving import ids, log_in
        from servers.object_store import Bucket
        kill_at("archive.before_keep", after=1)
        ids(log_in(Path({str(tmp_path)!r}), Bucket({bucket.endpoint!r}, {bucket.name!r})))
        """,
    )
    assert child.returncode == -9, child.stderr
    [left] = log.cache.glob("*.part")
    os.utime(left, (0, 0))
    assert ids(log) == list(range(12))
    assert not left.exists()


def test_the_service_archives_what_it_closes_and_says_what_keeps_it(tmp_path: Path, bucket: Bucket) -> None:
    config = config_of(tmp_path, bucket)
    log = log_in(tmp_path, bucket)
    with LocalLogWriter.open(log.folder, segment_bytes=SEGMENT_BYTES) as writer:
        with operate.archiving(config, "studio", every_s=0.05):
            for number in range(6):
                append(writer, [number])
            wait_for(log, lambda status: status.segments > 0 and not status.behind_segments)
            for number in range(6, 12):
                append(writer, [number])
            wait_for(log, lambda status: status.segments > 2 and not status.behind_segments)
        away = config_of(tmp_path, Bucket(f"http://127.0.0.1:{free_port()}", bucket.name))
        for number in range(12, 15):
            append(writer, [number])
        with operate.archiving(away, "studio", every_s=0.05):
            wait_for(log, lambda status: status.fault is not None and status.behind_segments > 0)


def wait_for(log: Any, holds: Callable[[ArchiveStatus], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds(status := log.archived()):
        assert time.monotonic() < deadline, f"the archive did not get there in 60 s: {status}"
        time.sleep(0.02)


def test_where_each_segment_lies_is_listed_and_status_says_what_keeps_the_archive(
    tmp_path: Path, bucket: Bucket
) -> None:
    log = log_in(tmp_path / "home", bucket)
    fill(log, 12)
    log.archive()
    retire(log)
    next(iter(log.reader().read(after_sequence=-1)))
    fill(log, 6, first=12)
    endpoint = f"http://127.0.0.1:{free_port()}"
    path = tmp_path / "deltaworks.yaml"
    archive = {"bucket": bucket.name, "endpoint": endpoint}
    source = {
        "kind": "postgres",
        "dsn": f"postgresql://127.0.0.1:{free_port()}/none",
        "tables": ["movie"],
        "log": {"kind": "local", "archive": archive},
    }
    path.write_text(yaml.safe_dump({"home": "home", "sources": {"studio": source}}))
    assert run(path, "log", "archive", "studio").exit_code != 0

    places = json.loads(run(path, "log", "ls", "studio", "--json").stdout)
    lies = [place["where"] for place in places]
    assert (lies[0], lies[1], lies[-1]) == (["archive", "cache"], ["archive"], ["here"])
    assert [place["first"] for place in places] == sorted(place["first"] for place in places)
    assert all(place["last"] + 1 == after["first"] for place, after in pairwise(places))
    [listed] = json.loads(run(path, "log", "ls", "--json").stdout)
    status = json.loads(run(path, "status", "--json").stdout)["sources"]["studio"]["archive"]
    assert status == listed["archive"]
    assert (status["segments"], status["behind_segments"] > 0) == (len(read_manifest(log.folder)), True)
    assert (status["fault"]["is_stopped"], endpoint in status["fault"]["error"]) == (False, True)
    assert "away since" in " ".join(run(path, "status").stdout.split())
    assert "archive, cache" in run(path, "log", "ls", "studio").stdout


def test_an_app_begins_in_the_archive_as_it_would_in_the_folder(tmp_path: Path, bucket: Bucket) -> None:
    config = config_of(tmp_path, bucket)
    log = log_of(config, "studio")
    assert isinstance(log, LocalLog)
    with LocalLogWriter.open(log.folder, segment_bytes=SEGMENT_BYTES) as writer:
        feed = Feed(writer)
        for film_id in range(20):
            feed.commit(create(FILM, film_id=film_id, title=f"Film {film_id}", status="released"))
        for film_id in range(0, 20, 3):
            feed.commit(update(FILM, film_id=film_id, title="Alien", status="released"))
        feed.commit(delete(FILM, film_id=5))
    results = []
    for name in ("with", "without"):
        sink = TableSink(tmp_path / f"{name}.sqlite")
        with Runner.open(film_app(sink), config=config, name="films") as runner:
            runner.drain()
        results.append(sink.documents())
        log.archive()
        retire(log)
        shutil.rmtree(config.app_folder("films"))
    assert len(segments(log.folder)) == 1
    assert results[0] == results[1]
    assert len(results[0]) == 20


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_segment_is_restored_from_its_archived_copy_and_nothing_is_lost(
    log: LocalLog, *, is_gone: bool
) -> None:
    log.archive()
    before = [group.header for group in log.reader().read(after_sequence=-1)]
    first = segments(log.folder)[1]
    [path] = segment_files(log.folder)[first]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    if is_gone:
        path.unlink()
    with LocalLogWriter.open(log.folder) as writer:
        mending = log.mending(writer)
        assert bool(mending.look_through()) is not is_gone, "what is not here is read from the archive as it is"
        assert mending.heed() is not is_gone
    assert mending.lost() == []
    assert [group.header for group in log.reader().read(after_sequence=-1)] == before
    if not is_gone:
        assert path.read_bytes() == whole
        assert (log.folder / "damaged" / path.name).stat().st_size == len(whole) // 2
