"""One reader at a time: a standby takes over in seconds, and who lost its place can do no harm."""

import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flows.readers import Readers, wait
from servers.postgres import Database

from deltaworks import operate
from deltaworks.operate.log import opened
from deltaworks.position import Lsn

TAKEOVER_S = 10.0


@pytest.fixture
def readers(database: Database, tmp_path: Path) -> Iterator[Readers]:
    """A source with a table, and nobody who reads it yet."""
    database.execute(
        "create table t (id int primary key, v text)",
        "insert into t select g, 'v' from generate_series(1, 100) g",
    )
    made = Readers(database, tmp_path)
    yield made
    made.stop()


def insert(readers: Readers, id_: int) -> None:
    readers.database.execute(f"insert into t values ({id_}, 'new')")


def identities(readers: Readers) -> Counter[tuple[int, int]]:
    """How often each streamed change is in the log."""
    seen: Counter[tuple[int, int]] = Counter()
    for group in readers.log().read(after_sequence=-1):
        for batch in group.batches:
            seen.update((row["_commit"], row["_ordinal"]) for row in batch.rows.to_pylist() if row["_op"] != "r")
    return seen


def ids(readers: Readers, *, home: str) -> set[int]:
    """Every id in a log."""
    return {
        row["id"]
        for group in readers.log(home).read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
    }


def pair(readers: Readers) -> None:
    """An active reader `a`, and a standby `b` that waits for it."""
    readers.start("a")
    wait(lambda: readers.last_id() == 100, what="the dump")
    readers.start("b")
    wait(lambda: readers.has_said("b", "standing by"), what="the standby")


def test_standby_takes_over_in_seconds_after_kill_nine(readers: Readers) -> None:
    pair(readers)
    insert(readers, 101)
    wait(lambda: readers.last_id() == 101, what="the change")
    readers.children[0].kill()
    insert(readers, 102)
    took_s = wait(lambda: readers.last_id() == 102, what="the takeover", timeout_s=TAKEOVER_S)
    assert took_s < TAKEOVER_S
    assert set(identities(readers).values()) == {1}


def test_reader_that_was_frozen_neither_writes_nor_confirms_when_it_wakes_up(readers: Readers) -> None:
    pair(readers)
    frozen = readers.children[0]
    insert(readers, 101)
    wait(lambda: readers.last_id() == 101, what="the change")
    epoch = readers.log().end().epoch

    frozen.send_signal(signal.SIGSTOP)
    insert(readers, 102)
    took_s = wait(lambda: readers.last_id() == 102, what="the takeover", timeout_s=TAKEOVER_S)
    assert took_s < TAKEOVER_S
    newer = readers.log().end().epoch
    assert newer > epoch

    frozen.send_signal(signal.SIGCONT)
    wait(lambda: readers.has_said("a", "stands by"), what="the return to standing by")
    for id_ in range(103, 110):
        insert(readers, id_)
    wait(lambda: readers.last_id() == 109, what="the later changes")
    assert frozen.poll() is None
    epochs = [group.header.epoch for group in readers.log().read(after_sequence=-1)]
    assert epochs == sorted(epochs)
    assert epochs[-1] == newer
    assert set(identities(readers).values()) == {1}
    ((confirmed,),) = readers.database.rows(
        "select confirmed_flush_lsn from pg_replication_slots where database = current_database()"
    )
    assert Lsn.parse(confirmed) <= readers.log().end().position

    # And it is the standby now.
    readers.children[1].kill()
    insert(readers, 110)
    wait(lambda: readers.last_id() == 110, what="the takeover back", timeout_s=TAKEOVER_S)


def test_reader_on_another_machine_waits_for_the_lease_of_the_source(readers: Readers) -> None:
    # Another home stands for another machine: no file is shared, only the source.
    readers.start("a")
    wait(lambda: readers.last_id() == 100, what="the dump")
    readers.start("b", home="elsewhere")
    wait(lambda: readers.has_said("b", "standing by"), what="the standby")
    readers.children[0].kill()
    insert(readers, 101)
    wait(lambda: readers.last_id(home="elsewhere") == 101, what="the takeover", timeout_s=TAKEOVER_S)
    # Its log is its own, and gets everything.
    wait(lambda: ids(readers, home="elsewhere") == set(range(1, 102)), what="the dump there")


def test_run_that_captures_up_to_now_leaves_the_work_to_the_service(readers: Readers) -> None:
    readers.start("a")
    wait(lambda: readers.last_id() == 100, what="the dump")
    insert(readers, 101)
    captured = operate.capture(readers.config(), "shop")
    assert captured.captured_by == "the capture service"
    assert readers.last_id() == 101


def test_run_that_waits_for_a_reader_does_the_work_itself_when_that_goes_away(readers: Readers) -> None:
    """It may have been no service, but a run like this one, which has taken what there was when it began."""
    config = readers.config()
    with opened(config, "shop") as database, ThreadPoolExecutor(1) as pool:
        lease = database.lease()
        captured = pool.submit(operate.capture, config, "shop")
        with pytest.raises(TimeoutError):
            captured.result(timeout=1.0)
        lease.close()
        assert captured.result(timeout=TAKEOVER_S).captured_by == "this run"
    assert readers.last_id() == 100


def test_reader_that_closes_has_let_go_of_the_lease_when_it_is_closed(readers: Readers) -> None:
    with opened(readers.config(), "shop") as database:
        for _ in range(40):
            database.lease().close()
