"""The next segment comes from the archive while one is read: one at a time, in bounds, errors in their turn."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from log.appending import append
from log.archiving import cached_bytes, config_of, damage, ids, retire
from servers.object_store import KEY_ID, SECRET_KEY, Application, Bucket, Environ, Respond, new_bucket, s3_server

from deltaworks.log import ahead
from deltaworks.log.archive.manifest import read_manifest
from deltaworks.log.archive.place import CorruptArchiveError
from deltaworks.log.change_log import ArchivedSegmentGoneError
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import LocalLog, log_of
from deltaworks.log.segment_file import segments
from deltaworks.object_store import ObjectStoreDownError

SEGMENT_BYTES, GROUPS, PATIENCE_S = 300_000, 160, 20.0


class Watched:
    """A store in front of which a test sees what is asked for, and holds or refuses it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.under_way: set[str] = set()
        self.most_at_once = 0
        self.held: set[str] = set()
        self.refused: set[str] = set()
        self.moved = threading.Condition()

    def __call__(self, application: Application) -> Application:
        def answer(environ: Environ, respond: Respond) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] != "GET" or not path.endswith((".sealed", ".segment")):
                return application(environ, respond)
            name = Path(path).name
            with self.moved:
                self.begun.append(name)
                self.under_way.add(name)
                self.most_at_once = max(self.most_at_once, len(self.under_way))
                self.moved.notify_all()
                assert self.moved.wait_for(lambda: name not in self.held, timeout=PATIENCE_S)
                self.under_way.discard(name)
                is_refused = name in self.refused
            if is_refused:
                respond("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>no</Message></Error>"]
            return application(environ, respond)

        return answer

    def hold(self, *names: str) -> None:
        """Answer for these only when it is let go."""
        with self.moved:
            self.held = set(names)
            self.moved.notify_all()

    def wait(self, what: Callable[[], bool]) -> None:
        with self.moved:
            assert self.moved.wait_for(what, timeout=PATIENCE_S), (self.begun, self.under_way)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is read ahead, so that where the reader is and what is given are not far apart."""
    monkeypatch.setattr("deltaworks.log.local_reader.RUN_BYTES", 20_000)
    monkeypatch.setattr("deltaworks.log.local_reader.FIRST_BYTES", 2_000)
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 20_000)


_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[Watched, str]]:
    watched = Watched()
    with s3_server(watched) as endpoint:
        yield watched, endpoint


@pytest.fixture
def watched(store: tuple[Watched, str]) -> Iterator[Watched]:
    found, _ = store
    found.begun, found.most_at_once, found.refused = [], 0, set()
    yield found
    found.hold()
    found.wait(lambda: not found.under_way)


@pytest.fixture
def bucket(watched: Watched, store: tuple[Watched, str]) -> Bucket:
    return new_bucket(store[1], f"ahead-{next(_numbers)}")


def archived(home: Path, bucket: Bucket, *, seal: bool = False) -> LocalLog:
    """A log of some segments, all but the last in the archive alone; a small one that is sealed would be one block."""
    log = log_of(config_of(home, bucket, seal=seal), "studio")
    assert isinstance(log, LocalLog)
    with LocalLogWriter.open(log.folder, segment_bytes=SEGMENT_BYTES) as writer:
        for number in range(GROUPS):
            append(writer, list(range(number * 200, number * 200 + 200)))
    log.archive()
    retire(log)
    assert len(read_manifest(log.folder)) >= 4
    return log


def names(log: LocalLog) -> list[str]:
    return [segment.name for segment in read_manifest(log.folder).values()]


def is_fetching_ahead() -> bool:
    return any(thread.name == "fetch-ahead" for thread in threading.enumerate())


def test_groups_are_given_while_the_next_segment_is_on_its_way(
    tmp_path: Path, watched: Watched, bucket: Bucket
) -> None:
    log = archived(tmp_path, bucket)
    first, second, third, *_ = read_manifest(log.folder).values()
    watched.hold(second.name)
    groups = log.reader().read(after_sequence=-1)
    # It is asked for right after the first run, and groups go on coming while it is not there.
    taken = [next(groups).header.sequence for _ in range(4)]
    watched.wait(lambda: second.name in watched.under_way)
    taken += [next(groups).header.sequence for _ in range(first.last // 2)]
    assert second.name in watched.under_way
    assert taken[-1] < first.last
    assert third.name not in watched.begun
    watched.hold()
    taken += [group.header.sequence for group in groups]
    assert taken == list(range(GROUPS))
    # Each once, in order, one at a time.
    assert (watched.begun, watched.most_at_once) == (names(log), 1)


def test_no_more_than_one_segment_is_fetched_ahead_and_none_for_who_takes_one_group(
    tmp_path: Path, watched: Watched, bucket: Bucket
) -> None:
    log = archived(tmp_path, bucket)
    listed = list(read_manifest(log.folder).values())
    next(log.reader().read(after_sequence=-1))
    list(log.reader().read(after_sequence=-1, max_changes=1))
    log.reader().header(0)
    assert watched.begun == [listed[0].name]
    assert not is_fetching_ahead()
    # The plan is at most two runs ahead of what is given: the one under way and the one after it.
    plan_groups = 2 * 20_000 // (SEGMENT_BYTES // (listed[0].last + 1)) + 2
    for group in log.reader().read(after_sequence=-1):
        planned = min(group.header.sequence + plan_groups, GROUPS - 1)
        at = sum(segment.first <= planned for segment in listed)
        assert len(set(watched.begun)) <= at + 1, (group.header.sequence, watched.begun)


def test_a_reader_in_bites_has_the_next_segment_on_its_way_too(
    tmp_path: Path, watched: Watched, bucket: Bucket
) -> None:
    log = archived(tmp_path, bucket)
    first, second, *_ = read_manifest(log.folder).values()
    reader, taken = log.reader(), 0
    watched.hold(second.name)
    while taken <= first.last // 2:
        taken += len(list(reader.read(after_sequence=taken - 1, max_changes=1_000)))
    # Its bites within the first segment do not wait for the second, though the copy is opened anew for each.
    watched.wait(lambda: second.name in watched.under_way)
    watched.hold()
    while bite := list(reader.read(after_sequence=taken - 1, max_changes=1_000)):
        taken += len(bite)
    assert taken == GROUPS
    assert watched.begun == names(log)


def test_the_bound_of_the_cache_holds_what_comes_ahead_too(tmp_path: Path, watched: Watched, bucket: Bucket) -> None:
    log = archived(tmp_path, bucket)
    largest = max(segment.bytes for segment in read_manifest(log.folder).values())
    expected = ids(log)
    for cache_bytes, is_ahead in ((2 * largest, True), (largest, False)):
        settings = log.settings.archive.model_copy(update={"cache_bytes": cache_bytes})  # type: ignore[union-attr]
        other = LocalLog(
            "studio",
            log.folder,
            log.settings.model_copy(update={"archive": settings}),
            cache=tmp_path / f"cache{cache_bytes}",
        )
        watched.begun = []
        seen: list[int] = []
        for group in other.reader().read(after_sequence=-1):
            assert cached_bytes(other) <= cache_bytes, group.header.sequence
            seen += group.batches[0].rows.column("id").to_pylist()
            assert is_ahead or not is_fetching_ahead()
        assert seen == expected
        assert watched.begun == names(log)


@pytest.mark.parametrize("what", ["damaged", "gone", "refused"])
def test_what_is_wrong_with_the_next_segment_is_told_after_all_groups_before_it(
    tmp_path: Path, watched: Watched, bucket: Bucket, what: str
) -> None:
    log = archived(tmp_path, bucket)
    first, second, *_ = read_manifest(log.folder).values()
    client, key = bucket.client(), f"deltaworks/studio/{second.name}"
    whole = client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    copy = tmp_path / "copy"
    copy.write_bytes(whole)
    damage(copy)
    error: type[Exception] = ObjectStoreDownError
    match what:
        case "damaged":
            client.put_object(Bucket=bucket.name, Key=key, Body=copy.read_bytes())
            error = CorruptArchiveError
        case "gone":
            client.delete_object(Bucket=bucket.name, Key=key)
            error = ArchivedSegmentGoneError
        case _:
            watched.refused = {second.name}
    reader, taken = log.reader(), []
    with pytest.raises(error):
        taken.extend(group.header.sequence for group in reader.read(after_sequence=-1))
    assert taken == list(range(second.first))
    # The same reader goes on when it is there again, and nothing that was hurt is kept.
    watched.refused = set()
    client.put_object(Bucket=bucket.name, Key=key, Body=whole)
    client.close()
    taken.extend(group.header.sequence for group in reader.read(after_sequence=first.last))
    assert taken == list(range(GROUPS))


def test_who_goes_in_the_middle_of_a_download_leaves_a_whole_copy_or_none(
    tmp_path: Path, watched: Watched, bucket: Bucket
) -> None:
    log = archived(tmp_path, bucket)
    second = names(log)[1]
    watched.hold(second)
    groups = log.reader().read(after_sequence=-1)
    for _ in range(4):
        next(groups)
    watched.wait(lambda: second in watched.under_way)
    began = time.monotonic()
    groups.close()  # type: ignore[attr-defined]  # it is a generator
    assert time.monotonic() - began < PATIENCE_S / 2, "closing waited for the store"
    # Another reader begins meanwhile, and neither reads what is not whole.
    other = log.reader().read(after_sequence=-1)
    taken = [next(other).header.sequence]
    watched.hold()
    taken += [group.header.sequence for group in other]
    assert taken == list(range(GROUPS))
    assert segments(log.folder)[0] > 0
