"""Runs of what left: of each key the newest is found at any time, however far the merging of runs went."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.process.declared import KEY
from deltaworks.process.ledger import left_runs
from deltaworks.process.ledger.left_runs import LeftRuns, read_runs

Key = int | str
Versions = dict[Key, tuple[int, int, str | None, bool]]

keys = st.one_of(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.lists(st.sampled_from("abcdefghijk"), min_size=1, max_size=12, unique=True),
    st.builds(lambda start, count: list(range(start, start + count)), st.integers(-40, 40), st.integers(1, 12)),
)
"""Of one run: in any order, texts, or as a dump has them."""
after_it = st.sampled_from(["go on", "go on", "roll back", "open again"])


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_runs, "LOOSE_AT_LEAST", 12)
    monkeypatch.setattr(left_runs, "PART", 5)
    monkeypatch.setattr(left_runs, "_SAMPLED", 3)


def run_of(some: Sequence[Key], position: int) -> pa.Table:
    sinks = [None if position % 3 else "" if len(str(key)) % 2 else "index,lake" for key in some]
    return pa.table(
        {
            KEY: pa.array(some, pa.int64() if isinstance(some[0], int) else pa.string()),
            "position": pa.array([position] * len(some), pa.uint64()),
            "ordinal": pa.array(range(len(some)), pa.uint32()),
            "minute": pa.array([position // 2] * len(some), pa.int32()),
            "sinks": pa.array(sinks, pa.string()).dictionary_encode(),
            "is_gone": pa.array([sink == "" for sink in sinks]),
        }
    )


def newest_of(tables: Iterator[pa.Table]) -> Versions:
    """Of a key that is in several runs the last one counts."""
    return {
        row[KEY]: (row["position"], row["ordinal"], row["sinks"], row["is_gone"])
        for table in tables
        for row in table.to_pylist()
    }


class State:
    """A state of which only this part is there."""

    def __init__(self, file: Path | str = ":memory:") -> None:
        self.file = file
        self.open()

    def open(self) -> None:
        self.connection = sqlite3.connect(self.file, isolation_level=None)
        self.runs = LeftRuns(self.connection)
        self.runs.create()

    def add(self, run: pa.Table, *, commit: bool = True) -> None:
        self.connection.execute("begin")
        self.runs.add(run)
        self.connection.execute("commit" if commit else "rollback")

    def ask(self, statement: str) -> Any:  # Any: values of SQLite
        return self.connection.execute(statement).fetchone()[0]


@settings(max_examples=100, deadline=None)
@given(events=st.lists(st.tuples(keys, after_it), min_size=1, max_size=40), step=st.integers(1, 8))
def test_of_each_key_the_newest_is_found_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[list[Key], str]], step: int
) -> None:
    expected: Versions = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(left_runs, "STEP_PER_ADDED", step)
        state = State(tmp_path_factory.mktemp("state") / "state.sqlite")
        for position, (some, event) in enumerate(events):
            run = run_of(some, position)
            state.add(run, commit=event != "roll back")
            if event != "roll back":
                expected |= newest_of(iter([run]))
            if event == "open again":
                state.connection.close()
                state.open()
            assert newest_of(read_runs(state.connection)) == expected
        state.connection.close()


def test_what_is_stored_stays_near_the_keys() -> None:
    with closing((state := State()).connection):
        for position in range(150):
            state.add(run_of([(position * 7 + place * 3) % 50 for place in range(10)], position))
            assert state.ask("select sum(documents) from left_run") <= 6 * 50 + 12
        assert newest_of(read_runs(state.connection)).keys() == set(range(50))


def test_a_dump_in_the_order_of_its_keys_is_never_written_again() -> None:
    with closing((state := State()).connection):
        state.connection.execute(
            "create trigger again before insert on left_piece begin select raise(abort, 'written again'); end"
        )
        for position in range(100):
            state.add(run_of(range(position * 5, position * 5 + 5), position))
        assert state.ask("select total(is_merged) from left_run") > 70
        assert len(newest_of(read_runs(state.connection))) == 500


def test_many_small_runs_become_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_runs, "PART", 40)
    with closing((state := State()).connection):
        for position in range(1000):
            state.add(run_of([position], position))
        assert state.ask("select count(*) from left_run where is_merged") < 100
        assert state.ask("select total(documents) from left_run") == 1000


def test_one_bucket_is_merged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many documents there are, what is in memory at once is about one part."""
    sizes: list[int] = []
    newest = left_runs._newest
    monkeypatch.setattr(left_runs, "PART", 200)
    monkeypatch.setattr(left_runs, "LOOSE_AT_LEAST", 5000)
    monkeypatch.setattr(left_runs, "_newest", lambda found: (sizes.append(len(found)), newest(found))[1])
    with closing((state := State()).connection):
        for position in range(300):
            state.add(run_of([(position * 97 + place * 31) % 3000 for place in range(90)], position))
    assert len(sizes) > 20
    assert max(sizes) < 4 * 200


def test_a_state_from_before_has_its_runs_merged_with_the_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(
            "create table left_run (id int not null, part int not null, documents int not null, "
            "is_merged int not null, body blob not null, primary key (id, part))"
        )
        for run_id, some in enumerate([[3, 1, 2], [2, 9], [9, 4]]):
            body = left_runs._encoded(run_of(some, run_id))
            connection.execute("insert into left_run values (?, 0, ?, 0, ?)", (run_id, len(some), body))
    with closing((state := State(file)).connection):
        expected = newest_of(read_runs(state.connection))
        for position in range(10, 40):
            run = run_of([position % 4, 9, position], position)
            state.add(run)
            expected |= newest_of(iter([run]))
            assert newest_of(read_runs(state.connection)) == expected
        assert state.ask("select total(is_merged) from left_run") > 0
