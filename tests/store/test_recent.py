"""Recent documents: what a crash leaves, what damage does, and what readers see while they become committed ones."""

import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document
from deltaworks.store.search import SearchIndex, SearchReader, SearchWriter
from deltaworks.store.search.committed import IndexWriteError
from deltaworks.store.search.layout import FreshnessRecord, IndexLayoutError
from deltaworks.store.search.read_back import SearchBackReader
from deltaworks.testing.faults import fail_at

SPEC = SearchIndex("films", text={"title": 1.0})
STEPS = ["search.before_append", "search.after_append", "search.before_commit", "search.after_commit", "written"]
"""In their order. Where one document is enough to be committed at once, nothing is appended."""


def document(key: int, position: int, title: str | None) -> Document:
    return Document(
        key=key,
        version=Version(Lsn(position), 0),
        committed_at=datetime.now(UTC),
        body=None if title is None else {"title": title},
    )


def flush(writer: SearchWriter, position: int, titles: dict[int, str | None]) -> None:
    writer.write([document(key, position, title) for key, title in titles.items()])
    writer.flush(up_to=Lsn(position))


def titles(folder: Path, count: int) -> list[str]:
    return [hit.body["title"] for hit in SearchReader(folder).documents(range(count))]


def recent_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("recent-*"))


# Crashes.


@pytest.mark.parametrize(("step", "at_most"), [*((step, 1_000) for step in STEPS), *((step, 1) for step in STEPS[2:])])
def test_a_kill_leaves_whole_flushes_and_the_replay_mends_it(tmp_path: Path, step: str, at_most: int) -> None:
    code = f"""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parents[1])!r})
    from store.test_recent import SPEC, SearchWriter, flush
    from deltaworks.faults import reach
    from deltaworks.testing.faults import kill_at
    writer = SearchWriter.open(Path({str(tmp_path)!r}), SPEC, commit_every_s=0.0, recent_at_most={at_most})
    flush(writer, 1, dict.fromkeys(range(20), "first"))
    time.sleep(0.3)
    kill_at({step!r})
    flush(writer, 2, {{key: None if key % 2 else "second" for key in range(20)}})
    time.sleep({0.3 if step == "written" else 30})
    reach("written")
    sys.exit("the step was not reached")
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    first, second = ["first"] * 20, ["second"] * 10
    assert titles(tmp_path, 20) in (first, second)

    writer = SearchWriter.open(tmp_path, SPEC)
    flush(writer, 2, {key: None if key % 2 else "second" for key in range(20)})
    writer.close()
    assert titles(tmp_path, 20) == second
    versions = {each.key: each.version.position for each in SearchBackReader(tmp_path).versions()}
    assert versions == {str(key): Lsn(2) for key in range(20)}


def test_documents_that_a_crash_left_recent_are_committed_by_the_next_writer(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    flush(writer, 1, {1: "Alien"})
    writer.close()
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    flush(writer, 2, {2: "Brazil"})
    flush(writer, 3, {3: "Cube"})
    writer.close()
    assert len(recent_files(tmp_path)) >= 2
    assert titles(tmp_path, 4) == ["Alien", "Brazil", "Cube"]

    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=0.0)
    writer.flush(up_to=Lsn(4))
    wait_until_committed(writer, tmp_path)
    writer.close()
    assert recent_files(tmp_path) == []
    assert titles(tmp_path, 4) == ["Alien", "Brazil", "Cube"]


def test_a_late_write_is_refused_by_what_is_recent(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    flush(writer, 5, {1: "Alien", 2: None})
    for _ in range(2):
        flush(writer, 3, {1: "Brazil", 2: "Cube"})
        assert titles(tmp_path, 3) == ["Alien"]
        writer.close()
        writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    writer.close()


def test_large_documents_do_not_wait_in_the_memory_of_readers(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    for position in range(1, 4):
        flush(writer, position, dict.fromkeys(range(20), "word " * 200_000))
        assert recent_files(tmp_path) == []
    writer.close()


# Damage.


def test_wherever_a_crash_cuts_the_last_write_the_flushes_before_it_stay(tmp_path: Path) -> None:
    folder, cut = tmp_path / "index", tmp_path / "cut"
    writer = SearchWriter.open(folder, SPEC, commit_every_s=60.0)
    flush(writer, 1, {1: "Alien"})
    flush(writer, 2, {2: "Brazil"})
    record = (folder / "freshness.json").read_text()
    before = recent_files(folder)[-1].stat().st_size
    flush(writer, 3, {2: "Cube"})
    writer.close()
    data = recent_files(folder)[-1].read_bytes()
    for end in range(before, len(data) + 1):
        shutil.copytree(folder, cut)
        # A crash before the record was replaced.
        (cut / "freshness.json").write_text(record)
        recent_files(cut)[-1].write_bytes(data[:end])
        SearchWriter.open(cut, SPEC, commit_every_s=60.0).close()
        assert titles(cut, 3) == ["Alien", "Brazil"]
        writer = SearchWriter.open(cut, SPEC, commit_every_s=60.0)
        writer.flush(up_to=Lsn(3))
        writer.close()
        assert titles(cut, 3) == ["Alien", "Cube" if end == len(data) else "Brazil"]
        shutil.rmtree(cut)


def test_damage_to_what_was_durable_is_told_with_its_place_by_all_who_open_it(tmp_path: Path) -> None:
    folder, rotten = tmp_path / "index", tmp_path / "rotten"
    writer = SearchWriter.open(folder, SPEC, commit_every_s=60.0)
    flush(writer, 1, {1: "Alien"})
    flush(writer, 2, {2: "Brazil"})
    writer.close()
    data = recent_files(folder)[-1].read_bytes()
    for place in range(0, len(data), 7):
        shutil.copytree(folder, rotten)
        recent_files(rotten)[-1].write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        for opening in (
            lambda: SearchReader(rotten).search("alien"),
            lambda: SearchBackReader(rotten),
            lambda: SearchWriter.open(rotten, SPEC),
        ):
            with pytest.raises(IndexLayoutError, match=r"'recent-\d+' is damaged from byte .*; to rebuild it"):
                opening()
        shutil.rmtree(rotten)


def test_after_a_failed_append_nothing_is_claimed(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC)
    flush(writer, 1, {1: "Alien"})
    with fail_at("search.before_append", OSError("no space left")), pytest.raises(IndexWriteError, match="checkpoint"):
        flush(writer, 2, {2: "Brazil"})
    with pytest.raises(IndexWriteError, match="open it again"):
        writer.flush(up_to=Lsn(3))
    writer.close()
    freshness = SearchReader(tmp_path).freshness()
    assert freshness is not None
    assert freshness.position == Lsn(1)
    writer = SearchWriter.open(tmp_path, SPEC)
    flush(writer, 2, {2: "Brazil"})
    writer.close()
    assert titles(tmp_path, 3) == ["Alien", "Brazil"]


def test_a_record_that_cannot_be_written_stops_the_writer_by_name_and_loses_nothing(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    flush(writer, 1, {1: "Alien"})
    # What the record is first written to: no file can be made there.
    (tmp_path / "freshness.json.new").mkdir()
    with pytest.raises(IndexWriteError, match="checkpoint"):
        flush(writer, 2, {2: "Brazil"})
    with pytest.raises(IndexWriteError, match="open it again"):
        writer.flush(up_to=Lsn(3))
    writer.close()
    (tmp_path / "freshness.json.new").rmdir()
    assert titles(tmp_path, 3) == ["Alien"]
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=60.0)
    writer.flush(up_to=Lsn(2))
    writer.close()
    assert titles(tmp_path, 3) == ["Alien", "Brazil"]


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("recent-7~").write_text("an editor's")
    writer = SearchWriter.open(tmp_path, SPEC)
    flush(writer, 1, {1: "Alien"})
    writer.close()
    assert titles(tmp_path, 2) == ["Alien"]
    assert tmp_path.joinpath("recent-7~").exists()


def test_a_failed_commit_is_told_at_the_next_flush_and_loses_nothing(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=0.0)
    with fail_at("search.before_commit", OSError("no space left")):
        flush(writer, 1, {1: "Alien"})
        assert writer._committing is not None
        assert writer._committing[0].exception(timeout=60) is not None
    with pytest.raises(IndexWriteError, match=r"no space left.*checkpoint"):
        flush(writer, 2, {2: "Brazil"})
    writer.close()
    assert titles(tmp_path, 3) == ["Alien"]
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=0.0)
    writer.flush(up_to=Lsn(2))
    wait_until_committed(writer, tmp_path)
    writer.close()
    assert titles(tmp_path, 3) == ["Alien"]


def test_a_record_that_a_power_cut_made_old_may_name_a_file_that_went(tmp_path: Path) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=0.0)
    flush(writer, 1, {1: "Alien"})
    record = (tmp_path / "freshness.json").read_text()
    wait_until_committed(writer, tmp_path)
    flush(writer, 2, {2: "Brazil"})
    writer.close()
    (tmp_path / "freshness.json").write_text(record)
    assert titles(tmp_path, 3)[0] == "Alien"
    writer = SearchWriter.open(tmp_path, SPEC)
    writer.flush(up_to=Lsn(2))
    writer.close()
    assert titles(tmp_path, 3) == ["Alien", "Brazil"]


# Readers.


@pytest.mark.parametrize(("every_s", "at_most"), [(0.0, 1_000), (0.02, 1_000), (0.0, 15)])
def test_readers_see_every_flush_whole_and_never_go_back(tmp_path: Path, every_s: float, at_most: int) -> None:
    writer = SearchWriter.open(tmp_path, SPEC, commit_every_s=every_s, recent_at_most=at_most)
    flush(writer, 1, dict.fromkeys(range(20), "film v1"))
    is_over = threading.Event()
    faults: list[str] = []
    seen: list[int] = []

    def read() -> None:
        reader, last = SearchReader(tmp_path), 0
        while not is_over.is_set():
            found = reader.search("film", limit=30)
            if (len(found.hits), found.total) != (20, 20):
                faults.append(f"{len(found.hits)} hits of {found.total}")
            versions = {hit.version.position.value for hit in reader.documents(range(20))}
            if len(versions) > 2 or min(versions) < last:
                faults.append(f"{sorted(versions)} after {last}")
            last = min(versions)
            seen.append(last)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    deadline, version = time.monotonic() + 3.0, 1
    while time.monotonic() < deadline:
        version += 1
        # Every third flush is large enough to be committed at once, where that is 15.
        keys = range(20) if version % 3 == 0 else range((version % 3 - 1) * 10, (version % 3) * 10)
        flush(writer, version, dict.fromkeys(keys, f"film v{version}"))
    is_over.set()
    for reader in readers:
        reader.join()
    writer.close()
    assert not faults
    assert len(set(seen)) > 5


def wait_until_committed(writer: SearchWriter, folder: Path) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        writer.flush(up_to=Lsn(1))
        record = FreshnessRecord.load(folder)
        if record is not None and not record.recent:
            return
        assert time.monotonic() < deadline, "what was recent was not committed in 30 s"
        time.sleep(0.01)
