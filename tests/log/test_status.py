"""Status and metrics of capture: true beside a service, without one, and when the source is away."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from log.replay import wait_until
from prometheus_client import CollectorRegistry, generate_latest
from servers.postgres import Database

from deltaworks.capture.continuity import Gap
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.status import SlotStatus, SourceStatus
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import PostgresConfig
from deltaworks.log.archive.standing import ArchiveStatus
from deltaworks.log.change_log import Group
from deltaworks.log.memory import MemoryLog
from deltaworks.log.metrics import CAPTURE_METRICS, TABLE_METRICS, CaptureCollector
from deltaworks.log.recorder import drain
from deltaworks.log.status import CanaryStatus, CaptureStatus, log_status, read_status
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.testing.postgres import free_port

MOVIE = TableName.parse("movie")


def appended(
    log: MemoryLog, count: int, *, position: int, committed_at: datetime | None = None, dumps: object = None
) -> None:
    """One group with that many changes of the movie table."""
    schema = TableSchema(
        name=MOVIE, columns=(Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),), key=("id",)
    )
    rows = {
        "_op": ["c"] * count,
        "_commit": [position] * count,
        "_ordinal": list(range(count)),
        "_txid": [7] * count,
        "_committed_at": [committed_at] * count,
        "_unchanged": [None] * count,
        "_old_key": [None] * count,
        "_as_text": [None] * count,
        "id": list(range(count)),
    }
    batches = ()
    if count:
        batches = (ChangeBatch(schema, pa.RecordBatch.from_pydict(rows, schema=change_schema(schema))),)
    with log.writer() as writer:
        progress = {} if dumps is None else {"dumps": {"public.movie": dumps}}
        writer.append(
            Group(batches=batches, position=Lsn(position), previous_position=writer.end().position, progress=progress)
        )


def answered(position: int, at: datetime) -> SourceStatus:
    return SourceStatus(position=Lsn(position), at=at, slot=None, row_counts={MOVIE: 1_000})


def status_of(log: MemoryLog, asked: SourceStatus | None = None) -> CaptureStatus:
    return log_status("studio", log.reader(), tables=[MOVIE], service=None, asked=asked)


def test_an_empty_log_has_a_status() -> None:
    status = status_of(MemoryLog(), answered(100, datetime.now(UTC)))
    assert (status.position, status.lag_bytes, status.lag_s, status.changes_per_s) == (Lsn(0), 100, None, 0)
    assert (status.tables[0].position, status.tables[0].dump) == (None, None)


def test_lag_is_by_the_sources_own_clock_and_nothing_when_it_has_no_more() -> None:
    log = MemoryLog()
    # The source's clock is far from ours: only its own times are compared.
    committed_at = datetime(2031, 5, 1, 12, tzinfo=UTC)
    appended(log, 3, position=50, committed_at=committed_at)
    behind = status_of(log, answered(80, committed_at + timedelta(seconds=7)))
    assert (behind.lag_bytes, behind.lag_s, behind.committed_at) == (30, 7.0, committed_at)
    level = status_of(log, answered(50, committed_at + timedelta(hours=3)))
    assert (level.lag_bytes, level.lag_s) == (0, 0.0)


def test_an_idle_source_lags_no_more_than_since_its_last_word() -> None:
    log = MemoryLog()
    long_ago = datetime.now(UTC) - timedelta(days=3)
    appended(log, 3, position=50, committed_at=long_ago)
    appended(log, 0, position=90)
    status = status_of(log, answered(95, datetime.now(UTC)))
    assert status.lag_s is not None
    assert status.lag_s < 60
    assert status.committed_at == long_ago


def test_rates_are_of_the_last_minute_and_dumps_say_how_long_they_will_take() -> None:
    log = MemoryLog()
    now = datetime.now(UTC)
    appended(log, 40, position=50, committed_at=now, dumps={"state": "reading", "rows": 100, "scanned": 100})
    appended(log, 60, position=60, committed_at=now, dumps={"state": "reading", "rows": 300, "scanned": 500})
    # A log whose first group is a second old: the rate is over that second.
    status = status_of(log, answered(60, now))
    table = status.tables[0]
    assert (status.changes_per_s, table.changes_per_s) == (100, 100)
    assert table.dump is not None
    assert (table.dump.rows, table.dump.estimated_rows, table.dump.rows_per_s, table.dump.eta_s) == (
        300,
        1_000,
        400,
        500 / 400,
    )
    appended(log, 0, position=70, dumps={"state": "done", "rows": 1_000})
    done = status_of(log, answered(70, now)).tables[0].dump
    assert done is not None
    assert (done.state, done.eta_s) == ("done", 0.0)


def test_changes_that_were_missed_are_named_until_they_are_dumped_again() -> None:
    log = MemoryLog()
    gap = Gap(since=Lsn(0x10), until=Lsn(0x20), reason="the slot is gone", noticed_at=datetime.now(UTC))
    with log.writer() as writer:
        writer.append(Group(batches=(), position=Lsn(0x20), progress={"gaps": [gap.to_json()]}))
        assert list(status_of(log).gaps) == ["changes from 0/10 to 0/20 were missed: the slot is gone"]
        assert 'deltaworks_capture_gaps{source="studio"} 1.0' in metrics_of(status_of(log))
        writer.append(Group(batches=(), position=Lsn(0x30), previous_position=Lsn(0x20), progress={}))
    assert status_of(log).gaps == []


@pytest.fixture
def captured(database: Database) -> Iterator[tuple[PostgresSource, MemoryLog]]:
    database.execute(
        "create table t (id int primary key)",
        "create table parts (id int primary key) partition by range (id)",
        "create table part_1 partition of parts for values from (0) to (1000)",
        "insert into t select generate_series(1, 500)",
        "insert into parts select generate_series(1, 70)",
        "analyze",
    )
    log = MemoryLog()
    with database.source("t", "parts") as source:
        with log.writer() as writer:
            drain(source, writer, log.reader())
        # The server does so a moment after the stream is closed.
        wait_until(lambda: not is_slot_active(source))
        yield source, log


def is_slot_active(source: PostgresSource) -> bool:
    slot = source.status(timeout_s=10).slot
    assert slot is not None
    return slot.is_active


def read(source: PostgresSource, log: MemoryLog) -> CaptureStatus:
    tables = [TableName.parse("t"), TableName.parse("parts")]
    return read_status(source, log.reader(), tables=tables, service=None)


def test_status_of_a_real_source_has_position_lag_slot_and_tables(
    database: Database, captured: tuple[PostgresSource, MemoryLog]
) -> None:
    source, log = captured
    database.execute("insert into t values (501)")
    status = read(source, log)
    assert status.source_position is not None
    assert status.source_position > status.position
    assert status.lag_bytes == status.source_position.value - status.position.value
    assert status.slot is not None
    assert (status.slot.name, status.slot.is_active) == (f"deltaworks_{database.name}", False)
    assert status.slot.wal_status == "reserved"
    assert (status.slot.kept_bytes or 0) > 0
    assert status.slot.safe_bytes is None
    tables = {table.table: table.dump for table in status.tables}
    assert {name: (dump.state, dump.rows, dump.estimated_rows) for name, dump in tables.items() if dump} == {
        "public.t": ("done", 500, 500),
        "public.parts": ("done", 70, 70),
    }
    assert json.loads(json.dumps(status.to_json()))["slot"]["wal_status"] == "reserved"
    assert status.to_json()["position"] == str(status.position)


def test_an_open_stream_shows_as_an_active_slot(captured: tuple[PostgresSource, MemoryLog]) -> None:
    source, log = captured
    with source.open(resume_after=log.reader().end().position):
        status = read(source, log)
        assert status.slot is not None
        assert status.slot.is_active


def test_a_source_that_does_not_answer_is_a_status_that_says_so_soon(
    captured: tuple[PostgresSource, MemoryLog],
) -> None:
    _, log = captured
    config = {"kind": "postgres", "dsn": f"postgresql://studio:s3cret@127.0.0.1:{free_port()}/x", "tables": ["t"]}
    away = PostgresSource("studio", PostgresConfig.model_validate(config))
    began_at = time.monotonic()
    status = read(away, log)
    assert time.monotonic() - began_at < 30
    assert status.unreachable is not None
    assert "is it running?" in status.unreachable
    assert "s3cret" not in status.unreachable
    assert (status.lag_bytes, status.lag_s, status.slot, status.changes) == (None, None, None, 570)


def test_a_server_that_accepts_and_says_nothing_does_not_hold_the_status_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"postgresql://studio@127.0.0.1:{silent.getsockname()[1]}/x"
        config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]})
        began_at = time.monotonic()
        status = read(PostgresSource("studio", config), MemoryLog())
        assert time.monotonic() - began_at < 30
    assert status.unreachable is not None


def metrics_of(*statuses: CaptureStatus) -> str:
    registry = CollectorRegistry()
    registry.register(CaptureCollector(lambda: statuses))
    return generate_latest(registry).decode()


def test_metrics_say_what_the_status_says(captured: tuple[PostgresSource, MemoryLog], database: Database) -> None:
    source, log = captured
    status = read(source, log)
    text = metrics_of(status, replace(status, source="other", unreachable="gone", lag_bytes=None, slot=None))
    assert f'deltaworks_capture_up{{source="{database.name}"}} 1.0' in text
    assert 'deltaworks_capture_up{source="other"} 0.0' in text
    assert f'deltaworks_capture_changes_total{{source="{database.name}"}} 570.0' in text
    assert f'deltaworks_capture_slot_active{{source="{database.name}"}} 0.0' in text
    assert f'deltaworks_capture_dump_rows{{source="{database.name}",table="public.t"}} 500.0' in text
    assert 'deltaworks_capture_lag_bytes{source="other"}' not in text


def test_every_metric_has_a_sample_when_everything_is_known() -> None:
    log = MemoryLog()
    now = datetime.now(UTC)
    appended(log, 4, position=50, committed_at=now, dumps={"state": "reading", "rows": 1, "scanned": 1})
    appended(log, 4, position=55, committed_at=now, dumps={"state": "reading", "rows": 9, "scanned": 9})
    slot = SlotStatus(
        name="s", is_active=True, wal_status="lost", kept_bytes=1, safe_bytes=2, unconfirmed_bytes=3, invalidation=None
    )
    archive = ArchiveStatus(address="s3://b/p/studio", segments=3, bytes=30, behind_segments=1, behind_bytes=10)
    canary = CanaryStatus(position=Lsn(55), age_s=1.0, took_s=0.1, limit_s=90.1, is_overdue=False)
    known = status_of(log, replace(answered(60, now), slot=slot))
    text = metrics_of(replace(known, archive=archive, canary=canary))
    for metric in (*CAPTURE_METRICS, *TABLE_METRICS):
        assert f"\n{metric.name}{{" in text, metric.name
    assert 'deltaworks_capture_slot_lost{source="studio"} 1.0' in text
    assert 'deltaworks_archive_up{source="studio"} 1.0' in text
    assert 'deltaworks_archive_behind_bytes{source="studio"} 10.0' in text
