"""While sinks flush the next changes are folded and processed: what leaves is in order, and nothing is forgotten."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypedDict

import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, ROLE, film_app
from process.material import INT, TEXT, Feed, TableSink, create, following, table_schema, update, wait_until

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process import entities, syncing
from deltaworks.process.app import App, Source
from deltaworks.process.checkpoint import read_checkpoint
from deltaworks.process.runner import STATE_FILE, Runner
from deltaworks.testing.memory_sink import MemorySink

MakeConfig = Callable[..., Config]
NOTE, COPY = (table_schema(name, "id", id=INT, title=TEXT) for name in ("note", "copy"))


class Gate:
    """Holds up every flush until it is opened."""

    def __init__(self) -> None:
        self.is_reached, self._is_open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.is_reached.set()
        assert self._is_open.wait(60)

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    faults.arm("process.after_flush", gate)
    yield gate
    gate.open()
    faults.disarm()


def folded(runner: Runner, log: MemoryLog) -> bool:
    return read_checkpoint(runner.folder / STATE_FILE).sequence == log.reader().end().sequence


def test_entity_that_changes_while_its_document_is_under_way_leaves_again(
    gate: Gate, sink: TableSink, make_config: MakeConfig, service: FaultyService, feed: Feed, log: MemoryLog
) -> None:
    feed.commit(create(FILM, film_id=1, title="Alien", status="released"))
    first = log.reader().end().position
    with (
        Runner.open(film_app(sink), config=make_config(url=service.url), name="films", log=log.reader()) as runner,
        following(runner),
    ):
        assert gate.is_reached.wait(60)
        feed.commit(update(FILM, film_id=1, title="Aliens", status="released"))
        feed.commit(create(FILM, film_id=2, title="Brazil", status="released"))
        wait_until(lambda: folded(runner, log), timeout_s=60)
        # Durable is what was written before the gate, and no position but its own is claimed.
        assert {key: body["title"] for key, body in sink.bodies().items()} == {1: "Alien"}
        assert sink.reached() == [first.value]
        gate.open()
        wait_until(lambda: sink.bodies().get(1, {}).get("title") == "Aliens" and 2 in sink.bodies(), timeout_s=60)
    assert sink.reached() == sorted(sink.reached())
    with Runner.open(film_app(sink), config=make_config(url=service.url), name="films", log=log.reader()) as runner:
        report = runner.drain()
    assert (report.documents, report.position) == (0, log.reader().end().position), "nothing was left undone"


class Note(TypedDict):
    title: str


def test_entity_that_is_refused_and_changed_meanwhile_waits_with_its_newest_row(
    gate: Gate, make_config: MakeConfig, feed: Feed, log: MemoryLog
) -> None:
    search = MemorySink("search")
    search.refusals[8] = "too long"
    studio = Source("studio")
    copies = studio.table("copy", schema=Note)
    notes = App("films", key="id", sources=[studio.table("note", schema=Note), copies])
    notes.sink(search)
    feed.commit(create(NOTE, id=8, title="Brazil"))
    with Runner.open(notes, config=make_config(), name="films", log=log.reader()) as runner:
        with following(runner):
            assert gate.is_reached.wait(60)
            feed.commit(update(NOTE, id=8, title="Brasil"))
            wait_until(lambda: folded(runner, log), timeout_s=60)
            gate.open()
            wait_until(lambda: bool(runner.dead()), timeout_s=60)
        [letter] = runner.dead()
        assert (letter.key, letter.error, letter.holds_key) == (8, "too long", True)
        search.refusals.clear()
        assert runner.retry_dead() == 1
        runner.drain()
        assert search.bodies[8]["title"] == "Brasil"


def test_entity_that_was_held_is_under_way_alone_and_no_position_is_told_meanwhile(
    sink: TableSink, make_config: MakeConfig, service: FaultyService, feed: Feed, log: MemoryLog
) -> None:
    service.names = {1: "Ripley"}
    service.fault = lambda _ids: 503
    feed.commit(
        create(FILM, film_id=1, title="Alien", status="released"), create(ROLE, role_id=1, film_id=1, person_id=1)
    )
    with Runner.open(film_app(sink), config=make_config(url=service.url), name="films", log=log.reader()) as runner:
        assert runner.drain(patience_s=0).held == 1
        service.fault = lambda _ids: None
        gate = Gate()
        faults.arm("process.after_flush", gate)
        with following(runner):
            assert gate.is_reached.wait(60)
            feed.commit(create(NOTE, id=1, title="of no app"))
            told = sink.reached()
            # Longer than it takes until sinks hear of a position that came with nothing to write.
            assert not threading.Event().wait(1.5)
            assert sink.reached() == told
            gate.open()
            wait_until(lambda: runner.report().held == 0, timeout_s=60)
    faults.disarm()
    assert sink.bodies()[1]["title"] == "Alien"


def test_nothing_leaves_before_the_state_it_was_made_of_is_on_disk(
    monkeypatch: pytest.MonkeyPatch,
    sink: TableSink,
    make_config: MakeConfig,
    service: FaultyService,
    feed: Feed,
    log: MemoryLog,
) -> None:
    gate, sync = Gate(), os.fdatasync

    def slow(descriptor: int) -> None:
        gate()
        sync(descriptor)

    monkeypatch.setattr(syncing.os, "fdatasync", slow)
    service.names = {1: "Ripley"}
    feed.commit(
        create(FILM, film_id=1, title="Alien", status="released"), create(ROLE, role_id=1, film_id=1, person_id=1)
    )
    with (
        Runner.open(film_app(sink), config=make_config(url=service.url), name="films", log=log.reader()) as runner,
        following(runner),
    ):
        assert gate.is_reached.wait(60)
        # Steps run while the disk works, but no document is written.
        wait_until(lambda: bool(service.calls), timeout_s=60)
        assert sink.bodies() == {}
        gate.open()
        wait_until(lambda: 1 in sink.bodies(), timeout_s=60)


def test_disk_that_refuses_a_sync_once_ends_the_app_before_anything_leaves(
    monkeypatch: pytest.MonkeyPatch, sink: TableSink, make_config: MakeConfig, feed: Feed, log: MemoryLog
) -> None:
    refusals = [OSError(errno.EIO, "the disk refuses")]

    def broken(_: int) -> None:
        # The next sync says yes, though the pages of this one are gone.
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(syncing.os, "fdatasync", broken)
    monkeypatch.setattr(entities, "CHANGES_PER_READ", 1)
    for number in range(1, 4):
        feed.commit(create(FILM, film_id=number, title="Alien", status="released"))
    config = make_config(url="http://127.0.0.1:1")
    with (
        Runner.open(film_app(sink), config=config, name="films", log=log.reader()) as runner,
        pytest.raises(OSError, match="the disk refuses"),
    ):
        runner.drain()
    assert sink.bodies() == {}
