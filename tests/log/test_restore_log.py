"""A log whose folder was lost is there again from its archive: what was archived, as readers saw it, and it goes on."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from log.appending import TABLE
from log.archiving import config_of, damage, fill, ids, keys, log_in, retire, run  # noqa: F401  a fixture
from log.test_local_log import run_child
from process.film_app import FILM, film_app
from process.material import Feed, TableSink, create
from servers.object_store import Bucket
from typer.testing import CliRunner

from deltaworks.cli import app as command_line
from deltaworks.errors import DeltaworksError
from deltaworks.log.archive.manifest import read_manifest
from deltaworks.log.archive.place import CorruptArchiveError
from deltaworks.log.archive.restore import LogThereError, NothingArchivedError, Restored
from deltaworks.log.archive.timelines import NAME as TIMELINE
from deltaworks.log.change_log import CorruptLogError, Group, OffsetRetiredError
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import LocalLog
from deltaworks.log.segment_file import segments
from deltaworks.object_store import ObjectStoreDownError
from deltaworks.position import Lsn
from deltaworks.process.runner import Runner
from deltaworks.testing.changes import batches
from deltaworks.testing.postgres import free_port


def append_transaction(writer: LocalLogWriter, number: int, *, parts: int) -> None:
    """One transaction as so many groups; only with the last of them readers see any."""
    end = writer.end()
    position = Lsn(end.position.value + 10)
    for part in range(parts):
        is_last = part == parts - 1
        writer.append(
            Group(
                batches=batches([create(TABLE, id=number * 100 + part)], position=position.value),
                position=position if is_last else end.position,
                previous_position=end.position,
                transaction_count=int(is_last),
                is_partial=not is_last,
            )
        )


def seen(log: LocalLog) -> list[tuple[int, int, Any]]:
    """What a reader of a log has of each group."""
    return [
        (group.header.sequence, group.header.position.value, group.batches[0].rows.column("id").to_pylist())
        for group in log.reader().read(after_sequence=-1)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_lost_again_and_again_it_is_what_was_archived_and_goes_on(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    chance = random.Random(seed)
    log = log_in(tmp_path, bucket, seal=bool(seed % 2))
    # Segments of one or a few groups, so that they end within transactions and some hold nothing but parts of one.
    size = chance.choice([2_000, 6_000])
    for life in range(3):
        with LocalLogWriter.open(log.folder, segment_bytes=size) as writer:
            for number in range(chance.randint(3, 6)):
                append_transaction(writer, 50 * life + number, parts=chance.choice([1, 1, 2, 5]))
        log.archive()
        archived = max(segment.last for segment in read_manifest(log.folder).values())
        before = seen(log)
        if chance.random() < 0.5:
            retire(log)
            assert seen(log) == before
        shutil.rmtree(log.folder)
        if chance.random() < 0.5:
            shutil.rmtree(log.cache, ignore_errors=True)

        restored = log.restore()
        assert seen(log) == before[: restored.last + 1]
        # No more is lost than what was never archived, and the transaction that goes on in there.
        behind = [group for group in before[restored.last + 1 : archived + 1] if group[1] > restored.position.value]
        assert behind == []
        # A life that came to no segment of its own left no timeline.
        assert 1 <= int((log.folder / TIMELINE).read_text()) <= life + 1
        assert [segment.first for segment in log.archive()] == []
    with LocalLogWriter.open(log.folder, segment_bytes=1) as writer:
        append_transaction(writer, 1_000, parts=1)
        append_transaction(writer, 1_001, parts=1)
    whole = seen(log)
    assert [sequence for sequence, _, _ in whole] == list(range(len(whole)))
    log.archive()
    retire(log)
    (log.folder / "archived").unlink()
    fill_one(log)
    log.archive()
    # The list of what is archived was lost too, and is found again along the timelines.
    assert seen(log)[: len(whole)] == whole


def fill_one(log: LocalLog) -> None:
    with LocalLogWriter.open(log.folder, segment_bytes=1) as writer:
        append_transaction(writer, 2_000, parts=1)


@pytest.mark.parametrize("step", ["archive.before_keep", "archive.before_restored", "archive.after_restored"])
def test_a_kill_at_any_step_leaves_a_whole_log_or_none(tmp_path: Path, bucket: Bucket, step: str) -> None:
    log = log_in(tmp_path, bucket)
    fill(log, 12)
    log.archive()
    before = ids(log)
    shutil.rmtree(log.folder)
    child = run_child(
        tmp_path,
        f"""
        from log.archiving import log_in
        from servers.object_store import Bucket
        kill_at({step!r})
        log_in(Path({str(tmp_path)!r}), Bucket({bucket.endpoint!r}, {bucket.name!r})).restore()
        """,
    )
    assert child.returncode == -9, child.stderr
    assert log.folder.exists() == (step == "archive.after_restored")
    if not log.folder.exists():
        log.restore()
    assert not list(log.folder.parent.glob("*.restoring"))
    assert ids(log) == before[: len(ids(log))]
    assert len(ids(log)) == segments(log.folder)[-1]
    fill(log, 3, first=90)
    assert ids(log)[-3:] == [90, 91, 92]


def test_what_is_there_is_not_touched_and_what_cannot_be_is_named(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, bucket)
    with pytest.raises(NothingArchivedError, match=r"has no segment of it; look at log\.archive"):
        log.restore()
    assert not log.folder.exists()
    fill(log, 12)
    log.archive()
    before = {path.name: path.read_bytes() for path in log.folder.iterdir()}
    with pytest.raises(LogThereError, match="move the folder away"):
        log.restore()
    assert {path.name: path.read_bytes() for path in log.folder.iterdir()} == before
    shutil.rmtree(log.folder)
    away = log_in(tmp_path, Bucket(f"http://127.0.0.1:{free_port()}", bucket.name))
    with pytest.raises(ObjectStoreDownError, match="cannot reach"):
        away.restore()
    plain = LocalLog("studio", log.folder, log.settings.model_copy(update={"archive": None}), cache=log.cache)
    with pytest.raises(NothingArchivedError, match=r"has no archive; set log\.archive"):
        plain.restore()
    assert not log.folder.exists()


def change(bucket: Bucket, make: Callable[[Any, list[str]], None]) -> None:
    client = bucket.client()
    try:
        make(client, [name for name in bucket.objects() if name.endswith(".sealed")])
    finally:
        client.close()


def test_a_damaged_end_and_a_hole_are_named(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, bucket)
    fill(log, 12)
    log.archive()
    everything = ids(log)
    shutil.rmtree(log.folder)

    def lose(client: Any, names: list[str]) -> None:
        client.delete_object(Bucket=bucket.name, Key=names[1])

    def spoil(client: Any, names: list[str]) -> None:
        found = client.get_object(Bucket=bucket.name, Key=names[-1])
        copy = tmp_path / "copy"
        copy.write_bytes(found["Body"].read())
        damage(copy)
        client.put_object(Bucket=bucket.name, Key=names[-1], Body=copy.read_bytes(), Metadata=found["Metadata"])

    change(bucket, lose)
    restored = log.restore()
    assert restored.lost == ["00000000000000000000.sealed"]
    assert restored.first > 0
    groups = log.reader().read(after_sequence=restored.first - 1)
    assert [group.batches[0].rows.column("id")[0].as_py() for group in groups] == everything[
        restored.first : restored.last + 1
    ]
    with pytest.raises(OffsetRetiredError, match="deltaworks log begin"):
        ids(log)
    shutil.rmtree(log.folder)
    change(bucket, spoil)
    with pytest.raises(CorruptArchiveError, match="it has sha256"):
        log.restore()
    assert not log.folder.exists()


def test_a_reader_that_has_read_what_is_lost_does_not_take_other_groups_for_it(tmp_path: Path, bucket: Bucket) -> None:
    config = config_of(tmp_path, bucket)
    log = log_in(tmp_path, bucket)

    def commit(first: int, count: int) -> None:
        with LocalLogWriter.open(log.folder, segment_bytes=6_000) as writer:
            feed = Feed(writer)
            for film_id in range(first, first + count):
                feed.commit(create(FILM, film_id=film_id, title=f"Film {film_id}", status="released"))

    def process() -> None:
        with Runner.open(film_app(TableSink(tmp_path / "sink.sqlite")), config=config, name="films") as runner:
            runner.drain()

    commit(0, 12)
    log.archive()
    process()
    shutil.rmtree(log.folder)
    restored = log.restore()
    assert restored.last < 11
    # Nothing is there for it yet, and both a drain and a service that waits for more are told why.
    with pytest.raises(CorruptLogError, match=r"the log ends at group 9 at .* restored to before that"):
        process()
    with pytest.raises(CorruptLogError, match="it ends at group"):
        log.reader().wait(after_sequence=11, timeout_s=1)
    # Committed later than what is lost.
    with LocalLogWriter.open(log.folder) as writer:
        end = writer.end()
        writer.append(Group(batches=(), position=Lsn(end.position.value + 5_000), previous_position=end.position))
    commit(50, 20)
    with pytest.raises(CorruptLogError, match="restored to before that"):
        process()
    shutil.rmtree(config.app_folder("films"))
    (tmp_path / "sink.sqlite").unlink()
    process()
    assert len(TableSink(tmp_path / "sink.sqlite").documents()) == restored.last + 1 + 20


def test_the_command_says_what_is_back(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path / "home", bucket)
    fill(log, 12)
    log.archive()
    shutil.rmtree(log.folder)
    path = tmp_path / "deltaworks.yaml"
    archive = {"bucket": bucket.name, "endpoint": bucket.endpoint}
    source = {"kind": "postgres", "dsn": "none", "tables": ["movie"], "log": {"kind": "local", "archive": archive}}
    path.write_text(yaml.safe_dump({"home": "home", "sources": {"studio": source}}))
    said = run(path, "log", "restore", "studio")
    assert said.exit_code == 0, said.output
    assert "groups 0 to" in said.output
    again = CliRunner().invoke(command_line, ["log", "restore", "studio", "--config", str(path)])
    assert isinstance(again.exception, DeltaworksError)
    assert isinstance(again.exception, LogThereError)


def test_a_restored_log_has_the_facts(tmp_path: Path, bucket: Bucket) -> None:
    log = log_in(tmp_path, bucket)
    fill(log, 12)
    log.archive()
    manifest = read_manifest(log.folder)
    shutil.rmtree(log.folder)
    done = log.restore()
    assert done == Restored(
        first=0,
        last=max(segment.last for segment in manifest.values()),
        position=log.reader().end().position,
        segments=len(manifest),
        bytes=sum(segment.bytes for segment in manifest.values()),
        lost=[],
    )
    assert read_manifest(log.folder) == manifest
