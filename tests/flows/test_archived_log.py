"""The archive beside the running product: segments go there, readers go on from it, a lost log is back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
import yaml
from flows.chain import ROOT
from flows.readers import wait
from servers.object_store import KEY_ID, SECRET_KEY, Bucket, answering, forgetting_who_was_first, new_bucket, s3_server
from servers.postgres import Database
from typer.testing import CliRunner

from deltaworks import operate
from deltaworks.capture.source import Severity
from deltaworks.cli import app as command_line
from deltaworks.config import Config, load
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.registry import log_of
from deltaworks.log.segment_file import segments
from deltaworks.operate.lake import open_lake
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.lake_table import LakeTable
from deltaworks.testing.postgres import free_port


class Row(TypedDict):
    v: str


class Document(TypedDict):
    id: int
    length: int


items = App("items", key="id", sources=[Source("shop").table("t", schema=Row)])


@items.transform
def document(item: Entity[Row]) -> Document:
    return {"id": item.key, "length": len(item.after["v"])}


items.sink(LakeTable("documents", schema=Document))


class Shop:
    """A table of a database, and a configuration with an archive for its log."""

    def __init__(self, database: Database, bucket: Bucket, folder: Path) -> None:
        self.database = database
        self.bucket = bucket
        self.folder = folder
        self.path = folder / "deltaworks.yaml"
        self.configure()

    def configure(self, **archive: Any) -> Config:
        place = {"bucket": self.bucket.name, "endpoint": self.bucket.endpoint, **archive}
        # Nothing is kept here that is in the archive.
        log = {"kind": "local", "segment_bytes": 1 << 16, "max_bytes": 1, "archive": place}
        name = self.database.name
        source = {"kind": "postgres", "dsn": self.database.dsn, "tables": ["t"], "slot": name, "publication": name}
        apps = {"items": {"module": f"{__name__}:items", "source": "shop"}}
        settings = {"home": "home", "sources": {"shop": source | {"log": log}}, "apps": apps}
        self.path.write_text(yaml.safe_dump(settings))
        return self.config

    @property
    def config(self) -> Config:
        return load(self.path, environment={})

    @property
    def log_folder(self) -> Path:
        return self.config.log_folder("shop")

    def insert(self, first: int, count: int = 400) -> None:
        self.database.execute(
            f"insert into t select g, repeat(md5(g::text), 40) from generate_series({first}, {first + count - 1}) g"
        )

    def run(self, *command: str) -> str:
        result = CliRunner().invoke(command_line, [*command, "--config", str(self.path)])
        assert result.exit_code == 0, result.output
        return result.output

    def archived(self) -> int:
        """Segments in the archive, once all that are closed are there; 0 until then."""
        status = log_of(self.config, "shop").archived()
        assert status is not None
        return 0 if status.behind_segments else status.segments

    def check_all_is_equal(self) -> None:
        config = self.config
        operate.load(config, "shop")
        assert operate.verify(config, "shop").is_equal
        operate.process(config, "items")
        operate.load(config, "items")
        with open_lake(config) as lake:
            found = lake.connection.execute("select id, length from lake.items.documents order by id").fetchall()
        assert found == self.database.rows("select id, length(v) from t order by id")

    def begin_a_segment(self) -> None:
        """Close the segment that is written to, right where the source was told that all is safe."""
        with LocalLogWriter.open(self.log_folder, segment_bytes=1) as writer:
            end = writer.end()
            empty = Group(batches=(), position=end.position, previous_position=end.position, progress=end.progress)
            writer.append(empty)


@pytest.fixture
def shop(database: Database, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    database.execute("create table t (id int primary key, v text not null)")
    made = Shop(database, bucket, tmp_path)
    made.insert(1)
    return made


@pytest.fixture
def service(shop: Shop) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a user starts it: it starts processes itself."""
    environment = {**os.environ, "DELTAWORKS_CONFIG": str(shop.path)}
    command = [sys.executable, "-m", "deltaworks.cli", "capture", "shop"]
    with (shop.folder / "capture.log").open("wb") as output:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    yield child
    child.terminate()
    child.wait(60)
    print((shop.folder / "capture.log").read_text())  # noqa: T201  shown where the test failed


@pytest.mark.timeout(400)
def test_what_the_service_archived_is_removed_here_and_read_from_there(
    shop: Shop, service: subprocess.Popen[bytes]
) -> None:
    log = LocalLogReader(shop.log_folder)
    wait(lambda: log.end().offset >= 400, what="the dump")
    shop.insert(1_000)
    wait(lambda: log.end().offset >= 800, what="the changes")
    # The service looks every ten seconds, and archives in a process of its own.
    wait(lambda: shop.archived() >= 3, what="the archive", timeout_s=120)
    assert "removed; the log keeps groups from" in shop.run("log", "retire", "shop")
    here, last = segments(shop.log_folder), log.end().sequence
    assert (len(here), here[0] > 0) == (1, True)
    # Readers begin where only the archive has anything, while the service goes on.
    shop.check_all_is_equal()
    assert list(shop.config.archive_cache_folder("shop").iterdir())
    shop.insert(2_000)
    shop.database.execute("delete from t where id between 1 and 90", "update t set v = 'short' where id < 1100")
    wait(lambda: log.end().sequence > last and log.end().offset >= 1_200, what="the changes after it")
    operate.capture(shop.config, "shop")
    shop.check_all_is_equal()
    assert service.poll() is None


def test_a_restored_log_goes_on_without_a_gap_where_the_source_has_the_rest(shop: Shop) -> None:
    operate.capture(shop.config, "shop")
    shop.insert(1_000)
    operate.capture(shop.config, "shop")
    shop.begin_a_segment()
    shop.run("log", "archive", "shop")
    end = LocalLogReader(shop.log_folder).end()
    shop.database.execute("delete from t where id < 20", "update t set v = 'late' where id = 1001")
    shutil.rmtree(shop.log_folder)
    assert "are back" in shop.run("log", "restore", "shop")
    operate.capture(shop.config, "shop")
    assert operate.history(shop.config, "shop").gaps == []
    reads = [
        batch.rows.column("_op").to_pylist().count("r")
        for group in log_of(shop.config, "shop").reader().read(after_sequence=end.sequence - 1)
        for batch in group.batches
    ]
    assert sum(reads) == 0, "nothing was dumped again"
    assert operate.verify_log(shop.config, "shop").is_whole
    shop.check_all_is_equal()


def test_a_restored_log_names_the_gap_and_ends_equal_where_the_source_has_it_no_more(shop: Shop) -> None:
    operate.capture(shop.config, "shop")
    shop.insert(1_000)
    operate.capture(shop.config, "shop")
    shop.begin_a_segment()
    shop.run("log", "archive", "shop")
    # Durable in the newest segment, so the source was told to forget it.
    shop.database.execute("delete from t where id < 20", "update t set v = 'late' where id = 1001")
    shop.insert(3_000, 3)
    operate.capture(shop.config, "shop")
    shutil.rmtree(shop.log_folder)
    shop.run("log", "restore", "shop")
    shop.database.execute("delete from t where id = 30")
    before = LocalLogReader(shop.log_folder).end()
    operate.capture(shop.config, "shop")
    # It is repaired at the end; the group after the restored ones names it.
    header = log_of(shop.config, "shop").reader().header(before.sequence + 1)  # type: ignore[attr-defined]  # local
    [gap] = header.progress["gaps"]
    assert "is ahead at" in json.dumps(gap)
    assert operate.history(shop.config, "shop").gaps == []
    shop.check_all_is_equal()


@pytest.mark.parametrize(
    ("change", "what", "mend"),
    [
        (forgetting_who_was_first, "accepted two writers", "leave log.archive out"),
        (answering("403 Forbidden", "AccessDenied"), "AccessDenied", "look at log.archive"),
        (answering("501 Not Implemented", "NotImplemented"), "NotImplemented", "use a store that knows it"),
    ],
)
def test_check_names_what_keeps_the_archive(shop: Shop, change: Any, what: str, mend: str) -> None:
    with s3_server(change) as endpoint:
        shop.bucket = new_bucket(endpoint, "checked")
        [finding] = archive_findings(shop.configure())
        assert what in finding.what
        assert mend in finding.mend


def test_check_is_ready_with_an_archive_that_works_and_names_one_that_is_away(shop: Shop) -> None:
    assert "shop: ready" in shop.run("check", "shop")
    [finding] = archive_findings(shop.configure(bucket="nobody-s"))
    assert "NoSuchBucket" in finding.what
    [finding] = archive_findings(shop.configure(endpoint=f"http://127.0.0.1:{free_port()}"))
    assert "cannot reach" in finding.what
    assert "log.archive.endpoint" in finding.mend


def archive_findings(config: Config) -> list[Any]:
    return [each for each in operate.check(config, "shop") if each.severity is Severity.ERROR]
