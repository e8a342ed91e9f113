"""Dumps on demand over a real server: what was asked for is in the log, and the stream never waits."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from log.replay import Row, ops, replay, table_of, wait_until
from servers.postgres import Database

from deltaworks import faults
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.log.dump_requests import DumpOutcome, DumpRequest, DumpRequests, Ending, Wanted
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import RecordReport, drain, follow

DEADLINE_S = 60.0
ROWS = "create table t (id int primary key, v text, n int not null default 0)"
FILL = "insert into t select g, 'v' || g from generate_series(1, {count}) g"


class Crash(Exception):  # noqa: N818  it stands for the death of the process
    """The process dies here."""


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def requests(tmp_path: Path) -> DumpRequests:
    return DumpRequests(tmp_path / "dumps")


@pytest.fixture
def sources(database: Database) -> Iterator[Callable[..., PostgresSource]]:
    """Makes sources over the test's database and closes them."""
    opened: list[PostgresSource] = []

    def source(*tables: str, **config: Any) -> PostgresSource:
        opened.append(database.source(*tables, **config))
        return opened[-1]

    yield source
    for each in opened:
        each.close()


def record(log: MemoryLog, source: PostgresSource, requests: DumpRequests | None = None) -> RecordReport:
    with log.writer() as writer:
        return drain(source, writer, log.reader(), requests=requests)


def ask(requests: DumpRequests, *tables: str, **what: Any) -> str:
    request = DumpRequest.new(tables, **what)
    requests.ask(request)
    return request.id


def ended(requests: DumpRequests, dump_id: str) -> DumpOutcome:
    outcome = requests.outcome(dump_id)
    assert outcome is not None, "the dump has not ended"
    return outcome


def ops_after(log: MemoryLog, offset: int) -> list[tuple[str, Any]]:
    return ops(log)[offset:]


@contextmanager
def service(source: PostgresSource, log: MemoryLog, requests: DumpRequests) -> Iterator[None]:
    """Capture runs as a service meanwhile."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        running = pool.submit(follow, source, writer, log.reader(), stop=stop, requests=requests)
        try:
            wait_until(lambda: log.reader().end().sequence >= 0)
            yield
        finally:
            stop.set()
            running.result(timeout=DEADLINE_S)


@pytest.fixture
def filled(database: Database) -> Database:
    """A table `t` with the keys 1 to 100."""
    database.execute(ROWS, FILL.format(count=100))
    return database


def test_all_tables_are_dumped_again_when_none_is_named(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    filled.execute("create table u (id int primary key)", "insert into u values (1)")
    source = sources("t", "u")
    record(log, source)
    dump_id = ask(requests)
    assert record(log, source, requests).reads == {"public.t": 100, "public.u": 1}
    outcome = ended(requests, dump_id)
    assert (outcome.ending, outcome.rows) == (Ending.DONE, {"public.t": 100, "public.u": 1})
    assert record(log, source, requests).reads == {}
    assert "asked" not in log.reader().end().progress or not log.reader().end().progress["asked"]


def test_chosen_keys_are_read_and_those_that_are_gone_are_told_and_deleted(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    source = sources("t")
    record(log, source)
    before = log.reader().end().offset
    dump_id = ask(requests, "t", keys=[("5",), ("77",), ("1000",), ("05",)])
    record(log, source, requests)
    assert ended(requests, dump_id).missing == (("1000",),)
    assert ops_after(log, before) == [("r", 5), ("r", 77), ("d", 1000)]


def test_key_that_cannot_be_one_ends_its_dump_and_not_the_capture(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    dump_id = ask(requests, "t", keys=[("five",)])
    assert record(log, sources("t"), requests).reads == {"public.t": 100}
    outcome = ended(requests, dump_id)
    assert outcome.ending is Ending.FAILED
    assert "integer" in (outcome.error or "")


@pytest.mark.parametrize(
    ("key", "value", "asked", "found", "missing"),
    [
        ("varchar(3)", "'abc'", ["abc", "abcd"], ["abc"], ["abcd"]),
        ("char(3)", "'ab'", ["ab", "abcd"], ["ab "], ["abcd"]),
        ("numeric(5,2)", "1.20", ["1.2", "1.201"], ["1.20"], ["1.201"]),
        ("timestamptz", "'2020-01-01 00:00+00'", ["2020-01-01 01:00+01"], ["2020-01-01 00:00:00+00"], []),
        ("bytea", "'\\x00ff'", ["\\x00ff", "\\x00"], ["\\x00ff"], ["\\x00"]),
    ],
)
def test_keys_are_compared_by_the_database_and_never_cut_to_a_column(
    database: Database,
    log: MemoryLog,
    requests: DumpRequests,
    sources: Callable[..., PostgresSource],
    key: str,
    value: str,
    asked: list[str],
    found: list[str],
    missing: list[str],
) -> None:
    database.execute(f"create table t (id {key} primary key)", f"insert into t values ({value})")
    source = sources("t")
    record(log, source)
    dump_id = ask(requests, "t", keys=[(each,) for each in asked])
    assert record(log, source, requests).reads == {"public.t": len(found)}
    assert ended(requests, dump_id).missing == tuple((each,) for each in missing)


def test_two_spellings_of_one_key_are_one_row_where_the_type_says_so(
    database: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    database.execute(
        "create extension citext",
        "create table t (id citext, part int, primary key (id, part))",
        "insert into t select chr(97 + g), p from generate_series(0, 9) g, generate_series(1, 2) p",
    )
    source = sources("t", chunk_rows=3)
    assert record(log, source).reads == {"public.t": 20}
    dump_id = ask(requests, "t", keys=[("A", "1"), ("a", "1"), ("B", "3")])
    assert record(log, source, requests).reads == {"public.t": 1}
    assert ended(requests, dump_id).missing == (("B", "3"),)


def test_condition_chooses_rows_and_looks_at_few_at_a_time(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    source = sources("t", chunk_rows=7)
    record(log, source)
    before = log.reader().end().offset
    dump_id = ask(requests, "t", where="id % 50 = 1 -- a comment")
    record(log, source, requests)
    assert ops_after(log, before) == [("r", 1), ("r", 51)]
    assert ended(requests, dump_id).rows == {"public.t": 2}


@pytest.mark.parametrize(
    "where",
    ["no such column", "1; delete from t", "id / (id - 3) > 0", "true) or (true", "set_config('a.b', 'c', false) > 1"],
)
def test_condition_that_does_not_hold_up_ends_its_dump_and_shows_no_row(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource], where: str
) -> None:
    source = sources("t")
    record(log, source)
    dump_id = ask(requests, "t", where=where)
    record(log, source, requests)
    if ") or (" not in where:
        assert ended(requests, dump_id).ending is Ending.FAILED
    assert filled.rows("select count(*) from t") == [(100,)]


def test_condition_that_fails_on_a_row_is_told_without_the_row(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    filled.execute("update t set v = 'secret'")
    dump_id = ask(requests, "t", where="v::int > 3")
    record(log, sources("t"), requests)
    outcome = ended(requests, dump_id)
    assert "InvalidTextRepresentation" in (outcome.error or "")
    assert "secret" not in (outcome.error or "")


def test_unknown_tables_are_told_and_known_ones_dumped_once(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    source = sources("t")
    record(log, source)
    some = ask(requests, "nope", "t", "public.t", "t")
    none = ask(requests, "nope")
    assert record(log, source, requests).reads == {"public.t": 100}
    assert (ended(requests, some).ending, ended(requests, some).unknown_tables) == (Ending.DONE, ("nope",))
    assert ended(requests, none).ending is Ending.FAILED
    assert "public.t" in (ended(requests, none).error or "")


def test_service_takes_requests_up_while_it_streams(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    with service(sources("t", chunk_rows=5), log, requests):
        wait_until(lambda: len(ops(log)) >= 100)
        dump_ids = [ask(requests, "t"), ask(requests, "t", where="id > 90"), ask(requests, "t", keys=[("7",)])]
        filled.execute("update t set n = n + 1")
        for dump_id in dump_ids:
            wait_until(lambda dump_id=dump_id: requests.outcome(dump_id) is not None)
    assert [sum(ended(requests, dump_id).rows.values()) for dump_id in dump_ids][2] <= 1
    assert replay(log, "t") == table_of(filled, "t")


def test_paused_dump_rests_and_goes_on_where_it_was_also_in_another_process(
    filled: Database,
    log: MemoryLog,
    requests: DumpRequests,
    sources: Callable[..., PostgresSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltaworks.log.dumping.REQUEST_POLL_S", 0.0)
    source = sources("t", chunk_rows=10)
    record(log, source)
    dump_id = ask(requests, "t")
    chunks = iter(range(100))
    faults.arm("dump.after_select", lambda: requests.want(dump_id, Wanted.PAUSE) if next(chunks) == 3 else None)
    first = record(log, source, requests).reads["public.t"]
    faults.disarm()
    assert 40 <= first < 100
    assert requests.outcome(dump_id) is None
    assert record(log, source, requests).reads == {}
    # It moved from what is not read yet to what was read, while nobody read.
    filled.execute("update t set id = -1 where id = 99")
    requests.want(dump_id, Wanted.RUN)
    again = record(log, sources("t", chunk_rows=10), requests).reads["public.t"]
    assert 99 - first <= again <= 100 - first + 1
    assert ended(requests, dump_id).ending is Ending.DONE
    assert replay(log, "t") == table_of(filled, "t")


def test_cancelled_dump_ends_and_keeps_what_it_read(
    filled: Database,
    log: MemoryLog,
    requests: DumpRequests,
    sources: Callable[..., PostgresSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltaworks.log.dumping.REQUEST_POLL_S", 0.0)
    source = sources("t", chunk_rows=10)
    record(log, source)
    dump_id = ask(requests, "t")
    chunks = iter(range(100))
    faults.arm("dump.after_mark", lambda: requests.want(dump_id, Wanted.CANCEL) if next(chunks) == 3 else None)
    read = record(log, source, requests).reads["public.t"]
    faults.disarm()
    outcome = ended(requests, dump_id)
    assert (outcome.ending, outcome.rows) == (Ending.CANCELLED, {"public.t": read})
    assert read < 100


def test_several_dumps_take_turns(
    database: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    for table in ("t", "u"):
        database.execute(
            ROWS.replace("table t", f"table {table}"), FILL.format(count=100).replace("into t", f"into {table}")
        )
    source = sources("t", "u", chunk_rows=10)
    record(log, source)
    after = log.reader().end().sequence
    ask(requests, "t")
    ask(requests, "u")
    record(log, source, requests)
    order = [next(iter(group.header.tables), None) for group in log.reader().read(after_sequence=after)]
    chunks = [table for table in order if table]
    assert chunks[:6] in (["public.t", "public.u"] * 3, ["public.u", "public.t"] * 3)


@pytest.mark.parametrize(
    "step", ["capture.before_append", "capture.after_append", "dump.after_select", "dump.after_mark"]
)
def test_crash_during_a_dump_on_demand_repeats_at_most_one_chunk(
    filled: Database, tmp_path: Path, requests: DumpRequests, sources: Callable[..., PostgresSource], step: str
) -> None:
    folder = tmp_path / "log"
    with LocalLogWriter.open(folder) as writer:
        drain(sources("t"), writer, LocalLogReader(folder))
    dump_id = ask(requests, "t", keys=[(str(key),) for key in range(1, 1200, 2)])
    crashes = 0
    for _ in range(12):
        passed = iter(range(100))
        faults.arm(step, lambda passed=passed: _crash() if next(passed) == 1 else None)
        with LocalLogWriter.open(folder) as writer:
            try:
                drain(sources("t"), writer, LocalLogReader(folder), requests=requests)
                break
            except Crash:
                crashes += 1
    faults.disarm()
    with LocalLogWriter.open(folder) as writer:
        drain(sources("t"), writer, LocalLogReader(folder), requests=requests)
    assert crashes >= 1
    outcome = ended(requests, dump_id)
    assert outcome.missing == tuple((str(key),) for key in range(101, 1200, 2))
    reads = [row["id"] for row in rows_of(folder) if row["_op"] == "r"][100:]
    deletes = [row["id"] for row in rows_of(folder) if row["_op"] == "d"]
    assert reads == list(range(1, 100, 2)), "the log holds a chunk once: cursor and rows are one write"
    assert deletes == list(range(101, 1200, 2))


def _crash() -> None:
    raise Crash


def rows_of(folder: Path) -> list[Row]:
    return [
        row
        for group in LocalLogReader(folder).read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
    ]


def test_locked_table_rests_while_changes_of_others_are_captured(
    filled: Database,
    log: MemoryLog,
    requests: DumpRequests,
    sources: Callable[..., PostgresSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltaworks.capture.postgres.connect.LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr("deltaworks.log.dumping.BLOCKED_S", 0.1)
    filled.execute("create table u (id int primary key)")
    with service(sources("t", "u"), log, requests), filled.connect() as migration:
        wait_until(lambda: len(ops(log)) >= 100)
        migration.execute("begin; lock table t in access exclusive mode")
        dump_id = ask(requests, "t")
        for key in range(20):
            filled.execute(f"insert into u values ({key})")
            wait_until(lambda key=key: ("c", key) in ops(log))
        wait_until(lambda: bool(log.reader().end().progress["asked"]))
        assert requests.outcome(dump_id) is None
        migration.execute("commit")
        wait_until(lambda: requests.outcome(dump_id) is not None)


def test_dump_does_not_wait_for_a_transaction_that_stays_open(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    source = sources("t")
    record(log, source)
    with filled.connect() as writer:
        writer.execute("begin; update t set n = 9 where id = 3")
        dump_id = ask(requests, "t")
        record(log, source, requests)
        assert ended(requests, dump_id).rows == {"public.t": 100}
        writer.execute("commit")
    record(log, source)
    assert replay(log, "t") == table_of(filled, "t")


def test_changes_that_are_too_many_to_hold_make_the_dump_wait_and_nothing_is_lost(
    filled: Database,
    log: MemoryLog,
    requests: DumpRequests,
    sources: Callable[..., PostgresSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltaworks.log.dumping.HELD_BYTES", 200)
    source = sources("t", chunk_rows=20)
    record(log, source)
    dump_id = ask(requests, "t")
    statements = iter(["update t set n = n + 1", "delete from t where id = 40", "update t set id = 500 where id = 90"])
    faults.arm("dump.after_select", lambda: filled.execute(next(statements, "select 1")))
    record(log, source, requests)
    faults.disarm()
    assert ended(requests, dump_id).ending is Ending.DONE
    record(log, source)
    assert replay(log, "t") == table_of(filled, "t")


def test_large_rows_end_a_chunk_early(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.capture.postgres.reading.CHUNK_BYTES", 1 << 20)
    database.execute(
        "create table t (id int primary key, v text)",
        "insert into t select g, repeat(chr(65 + g % 26), 100000 * (g % 7)) from generate_series(1, 120) g",
    )
    record(log, sources("t"))
    sizes = [group.batches[0].rows.nbytes for group in log.reader().read(after_sequence=-1) if group.batches]
    assert len(sizes) > 10
    assert max(sizes) < 6 << 20
    assert replay(log, "t") == table_of(database, "t")


def test_initial_dump_is_not_held_back_by_another_dump_of_its_table(
    filled: Database, log: MemoryLog, requests: DumpRequests, sources: Callable[..., PostgresSource]
) -> None:
    dump_id = ask(requests, "t")
    assert record(log, sources("t", chunk_rows=10), requests).reads == {"public.t": 200}
    assert ended(requests, dump_id).ending is Ending.DONE
