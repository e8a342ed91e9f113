"""Members of one app, moved by hand: whatever happens, per key the sink ends at the reference and never goes back."""

import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

import pytest
from process.material import INT, TEXT, Feed, create, delete, table_schema, update
from process.memory_group import MemoryGroup, MemoryMembership
from process.shared_table import SharedTable

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.membership import MembershipLostError, SharesError
from deltaworks.operate.sink_audit import differing
from deltaworks.position import Lsn, Version
from deltaworks.process import entities, sharing
from deltaworks.process.app import App, Backoff, Source, count
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.ledger import LedgerReader
from deltaworks.process.left_keys import LeftKeys
from deltaworks.process.place import AppHeldError
from deltaworks.process.runner import Runner
from deltaworks.process.shares import share_of
from deltaworks.process.sharing import NotShareableError
from deltaworks.process.sink import Document
from deltaworks.process.stood import stood
from deltaworks.testing.memory_sink import MemorySinkReader

SHARES, ORDERS = 5, 12
NEVER = datetime.fromtimestamp(0, UTC)
ORDER = table_schema("purchase", "order_id", order_id=INT, status=TEXT)
LINE = table_schema("line", "line_id", line_id=INT, order_id=INT, sku=INT)
ITEM = table_schema("item", "sku", sku=INT, label=TEXT)
STEPS = ("process.after_read", "process.before_fold_commit", "process.after_fold", "process.after_write")
STEPS += ("process.after_flush", "process.after_checkpoint", "process.after_turn")
shop = Source("shop")


class Order(TypedDict):
    status: str


class Line(TypedDict):
    sku: int


def order_app(
    sink: SharedTable,
    labels: Mapping[int, str],
    *,
    has_lookup: bool,
    tell: Callable[[Transition[Order]], None] | None = None,
) -> App:
    line = shop.table("line", schema=Line)
    app = App("orders", key="order_id", sources=[shop.table("purchase", schema=Order), line])

    @app.filter
    def is_open(order: Entity[Order]) -> bool:
        return not order.after["status"].startswith("draft")

    if has_lookup:

        @app.enrich(
            into="labels",
            key=lambda order: [each["sku"] for each in order.rows(line)],
            lookup=shop.table("item", key="sku"),
        )
        async def labelled(skus: list[int]) -> dict[int, str]:
            return {sku: labels[sku] for sku in skus}

    @app.transform
    def document(order: Entity[Order]) -> dict[str, Any]:
        skus = [each["sku"] for each in order.rows(line)]
        names = [order["labels"][sku] for sku in skus] if has_lookup else skus
        return {"status": order.after["status"], "lines": names}

    if not has_lookup:
        # What left last is known to who sent it: another member may have sent something else since.
        app.dedup()
    if tell is not None:
        app.on_change("status", retry=Backoff(first_s=0.001, max_s=0.001))(tell)
    app.sink(sink)
    return app


class DiedError(Exception):
    """Stands for SIGKILL; nothing catches it."""


class AwayError(RetryableError):
    """A partner that is not there for a moment."""


class World:
    """A shop, its members, and what their sink should hold."""

    def __init__(self, folder: Path, *, seed: int, has_lookup: bool, tells: bool = False) -> None:
        self.chance = random.Random(seed)
        self.has_lookup = has_lookup
        self.tells = tells
        self.statuses: list[tuple[int, str]] = []
        self.told: list[tuple[int, str]] = []
        self.folder = folder
        self.sink = SharedTable(folder / "sink.sqlite")
        self.writer = LocalLogWriter.open(folder / "log")
        self.feed = Feed(self.writer)
        self.group = MemoryGroup(SHARES)
        self.members: dict[str, tuple[Runner, MemoryMembership]] = {}
        self.names = (f"m{number}" for number in itertools.count())
        self.labels = {sku: f"item {sku}" for sku in range(4)}
        self.orders: dict[int, str] = {}
        self.lines: dict[int, tuple[int, int]] = {}

    def config(self, name: str) -> Config:
        source = {"kind": "postgres", "dsn": "none", "tables": ["purchase"]}
        app = {"module": "none:none", "source": "shop", "shares": SHARES}
        return Config.model_validate(
            {"home": str(self.folder / name), "sources": {"shop": source}, "apps": {"orders": app}}
        )

    def join(self, name: str) -> None:
        membership = self.group.join()
        app = order_app(self.sink, self.labels, has_lookup=self.has_lookup, tell=self.hear if self.tells else None)
        log = LocalLogReader(self.folder / "log")
        member = Runner.open(app, config=self.config(name), name="orders", log=log, membership=membership)
        self.members[name] = member, membership

    def hear(self, turn: Transition[Order]) -> None:
        """What a partner is told of; now and then it has no time."""
        if self.chance.random() < 0.1:
            raise AwayError
        self.told.append((turn.key, turn.after["status"]))

    def leave(self, name: str) -> None:
        self.members.pop(name)[0].close()

    def kill(self, name: str) -> None:
        """Its session ends, and nothing it would have said at its end is heard."""
        member, membership = self.members.pop(name)
        if membership in self.group.members:
            self.group.cut_off(membership)
        member.close()

    def die_in_the_middle(self, name: str) -> None:
        """It is killed at some step of a cycle."""
        passes = self.chance.randrange(1, 5)

        def die() -> None:
            nonlocal passes
            passes -= 1
            if passes == 0:
                raise DiedError

        faults.arm(self.chance.choice(STEPS), die)
        with suppress(DiedError):
            self.step(name)
        faults.disarm()
        self.kill(name)

    def step(self, name: str) -> None:
        """A member does what it can now."""
        with suppress(MembershipLostError):
            self.members[name][0].drain(patience_s=0.0)

    def step_and_be_cut_off_in_the_write(self, name: str) -> None:
        """A member is frozen after it was seen to be one, and wakes up when the others have done its work."""
        frozen, membership = self.members[name]
        others = [other for other in self.members if other != name]

        def freeze() -> None:
            faults.disarm()
            if membership in self.group.members:
                self.group.cut_off(membership)
            self.change(3)
            for other in others * 3:
                self.step(other)

        # Every cycle passes here before its sinks are flushed.
        faults.arm("process.after_write", freeze)
        with suppress(MembershipLostError):
            frozen.drain(patience_s=0.0)
        faults.disarm()

    def change(self, times: int) -> None:
        for _ in range(times):
            order = self.chance.randrange(ORDERS)
            match self.chance.randrange(6):
                case 0 if order in self.orders:
                    del self.orders[order]
                    self.feed.commit(delete(ORDER, order_id=order))
                case 1:
                    sku = self.chance.choice(list(self.labels))
                    self.labels[sku] = f"item {self.chance.random()}"
                    self.feed.commit(update(ITEM, sku=sku, label=self.labels[sku]))
                case 2 | 3:
                    line = self.chance.randrange(ORDERS)
                    what = update if line in self.lines else create
                    self.lines[line] = order, self.chance.choice(list(self.labels))
                    self.feed.commit(what(LINE, line_id=line, order_id=order, sku=self.lines[line][1]))
                case _:
                    what = update if order in self.orders else create
                    before, status = self.orders.get(order), self.chance.choice(("draft", "open", "paid"))
                    if self.tells:
                        # So that what was told says which of an order's transitions it was.
                        status += f" {len(self.statuses)}"
                    self.orders[order] = status
                    if status != before:
                        self.statuses.append((order, status))
                    self.feed.commit(what(ORDER, order_id=order, status=self.orders[order]))

    def expected(self) -> dict[int, Any]:
        return {
            order: {
                "status": status,
                "lines": [
                    self.labels[sku] if self.has_lookup else sku
                    for _, (of, sku) in sorted(self.lines.items())
                    if of == order
                ],
            }
            for order, status in self.orders.items()
            if not status.startswith("draft")
        }

    @contextmanager
    def ledgers(self) -> Iterator[list[LedgerReader]]:
        """Those of all members that ever were."""
        with ExitStack() as opened:
            files = sorted(self.folder.glob("*/process/orders/**/state.sqlite"))
            yield [opened.enter_context(LedgerReader(file)) for file in files]

    def check_ledgers(self, *, is_whole: bool = False) -> None:
        """No audit raises an alarm, of all members' ledgers or of one's alone; `is_whole`: they know all that left."""
        held = {
            key: Document(key=key, version=Version(Lsn(position), ordinal), committed_at=NEVER, body=json.loads(body))
            for key, position, ordinal, body in self.sink.rows()
        }
        with self.ledgers() as ledgers:
            for some in (ledgers, *([each] for each in ledgers)):
                left = LeftKeys.of(each.left_tables() for each in some)
                assert not len(differing(left, MemorySinkReader(held), sink="table")), "a false alarm"
            if not is_whole:
                return
            everything = LeftKeys.of(each.left_tables() for each in ledgers)
            known = {text: everything.version(place) for place, text in enumerate(everything.texts.to_pylist())}
            assert known == {str(key): each.version for key, each in held.items()}
            lost = self.chance.choice(list(held) or [None])
            if lost is not None and held[lost].body is not None:
                del held[lost]
                (place,) = differing(everything, MemorySinkReader(held), sink="table")
                assert everything.texts[int(place)].as_py() == str(lost)
            counted = stood(everything, ledgers, entity="purchase", keeps_rows=True)
            assert sum(each.left for each in counted) == len(self.expected())
            assert sum(each.waiting + each.held + each.dead for each in counted) == 0

    def settle(self) -> None:
        for _ in range(50):
            for name in list(self.members):
                self.step(name)
            if min(self.group.done.values()) == self.writer.end().sequence:
                break
        assert self.sink.bodies() == self.expected()
        self.check_ledgers(is_whole=True)

    def close(self) -> None:
        for name in list(self.members):
            self.kill(name)
        self.writer.close()


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(tmp_path / f"world{len(made)}", **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.parametrize("has_lookup", [False, True])
@pytest.mark.parametrize("can_freeze", [False, True])
def test_whatever_members_do_the_sink_ends_at_the_reference(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, has_lookup: bool, can_freeze: bool
) -> None:
    # Small cycles, so that members are in the middle of something whenever something happens to them.
    for name, size in (("CHANGES_PER_READ", 2), ("CHANGES_PER_FOLD", 4), ("ENTITIES_PER_CYCLE", 2)):
        monkeypatch.setattr(entities, name, size)
    for seed in [int.from_bytes(os.urandom(3)) for _ in range(3)]:
        world = make_world(seed=seed, has_lookup=has_lookup)
        world.join(next(world.names))
        for _ in range(40):
            _something(world, can_freeze=can_freeze)
            world.check_ledgers()
        if not world.members:
            world.join(next(world.names))
        try:
            world.settle()
            if not can_freeze:
                assert world.sink.stale() == 0, "an older document was sent"
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        world.close()


def _something(world: World, *, can_freeze: bool) -> None:
    world.change(world.chance.randrange(4))
    names = list(world.members)
    name = world.chance.choice(names) if names else None
    match world.chance.randrange(9):
        case 0 if len(names) < 4:
            world.join(next(world.names))
        case 1 if name is not None and len(names) > 1:
            world.leave(name)
        case 2 if name is not None:
            world.die_in_the_middle(name)
        case 3 if name is not None:
            # The same machine again, with the state it had.
            world.die_in_the_middle(name)
            world.join(name)
        case 4 if name is not None and can_freeze:
            world.step_and_be_cut_off_in_the_write(name)
        case _ if name is not None:
            world.step(name)


def test_every_transition_is_told_in_the_order_of_its_key_whoever_has_its_share(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("CHANGES_PER_READ", 2), ("CHANGES_PER_FOLD", 4), ("ENTITIES_PER_CYCLE", 2)):
        monkeypatch.setattr(entities, name, size)
    monkeypatch.setattr(sharing, "FORGET_EVERY_S", 0.0)
    for seed in [int.from_bytes(os.urandom(3)) for _ in range(4)]:
        world = make_world(seed=seed, has_lookup=False, tells=True)
        world.join(next(world.names))
        for _ in range(40):
            _something(world, can_freeze=False)
        if not world.members:
            world.join(next(world.names))
        try:
            world.settle()
            for order in range(ORDERS):
                _check_told(
                    [status for key, status in world.told if key == order],
                    [status for key, status in world.statuses if key == order],
                )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        world.close()


def _check_told(told: list[str], happened: list[str]) -> None:
    """At least once, and in order: one that is told again is followed by all that came after it."""
    assert list(dict.fromkeys(told)) == happened
    at = -1
    for status in told:
        now = happened.index(status)
        assert now <= at + 1, f"{status} was told before what came before it"
        at = now
    assert at == len(happened) - 1, "what was told last is not what happened last"


def test_a_transition_that_failed_for_good_moves_with_its_share(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False, tells=True)
    refused, heard = {"paid"}, world.told
    order = next(key for key in range(ORDERS) if share_of(key, shares=SHARES) % 2)

    def hear(turn: Transition[Order]) -> None:
        if turn.after["status"] in refused:
            raise ValueError
        heard.append((turn.key, turn.after["status"]))

    world.hear = hear  # type: ignore[method-assign]
    world.join("a")
    for status, change in (("open", create), ("paid", update), ("sent", update)):
        world.orders[order] = status
        world.feed.commit(change(ORDER, order_id=order, status=status))
    world.step("a")
    [letter] = world.members["a"][0].dead()
    assert (letter.key, letter.waiting, heard) == (order, 1, [(order, "open")])

    # Another member takes the share: it tries again, and no letter is left where nobody can see to it.
    world.join("b")
    for name in ("a", "b", "a", "b"):
        world.step(name)
    assert world.members["a"][0].dead() == []
    [letter] = world.members["b"][0].dead()
    refused.clear()
    world.members["b"][0].retry_dead()
    world.settle()
    assert list(dict.fromkeys(heard)) == [(order, "open"), (order, "paid"), (order, "sent")]
    assert heard[-2:] == [(order, "paid"), (order, "sent")]


def test_each_member_processes_its_own_shares_only(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    for name in ("a", "b"):
        world.join(name)
    for name in ("a", "b", "a"):
        world.step(name)
    for order in range(ORDERS):
        world.orders[order] = "open"
        world.feed.commit(create(ORDER, order_id=order, status="open"))
    reports = {name: world.members[name][0].drain(patience_s=0.0) for name in ("a", "b")}
    assert min(report.documents for report in reports.values()) > 0
    assert sum(report.documents for report in reports.values()) == ORDERS
    world.settle()


def test_a_member_that_was_cut_off_writes_nothing(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    world.join("a")
    world.step("a")
    world.feed.commit(create(ORDER, order_id=1, status="open"))

    # Its session ends while it is in its steps.
    member, membership = world.members["a"]
    faults.arm("process.after_fold", lambda: world.group.cut_off(membership))
    with pytest.raises(MembershipLostError):
        member.drain(patience_s=-1.0)
    faults.disarm()
    assert world.sink.bodies() == {}
    world.orders[1] = "open"
    world.settle()


def test_what_a_member_sent_last_counts_for_nothing_once_another_had_the_share(
    make_world: Callable[..., World],
) -> None:
    world = make_world(seed=1, has_lookup=False)
    order = next(key for key in range(ORDERS) if share_of(key, shares=SHARES) % 2)

    def say(status: str, change: Callable[..., Any] = update) -> None:
        world.orders[order] = status
        world.feed.commit(change(ORDER, order_id=order, status=status))
        world.settle()

    world.join("a")
    say("open", create)
    world.join("b")
    say("paid")
    world.leave("b")
    say("open")


def test_members_on_one_machine_have_a_folder_each(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    world.join("a")
    first = world.members["a"][0]
    app = order_app(world.sink, world.labels, has_lookup=False)
    log = LocalLogReader(world.folder / "log")
    with Runner.open(app, config=world.config("a"), name="orders", log=log, membership=world.group.join()) as second:
        assert second.folder.parent == first.folder
    with pytest.raises(AppHeldError, match=str(os.getpid())):
        Runner.open(app, config=world.config("a"), name="orders", log=log)


def test_an_app_on_a_local_log_is_not_shared(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    app = order_app(world.sink, world.labels, has_lookup=False)
    with pytest.raises(SharesError, match="of one machine"):
        Runner.open(app, config=world.config("a"), name="orders")


def test_what_only_one_process_can_do_is_refused_with_every_reason(make_world: Callable[..., World]) -> None:
    class Plain(SharedTable):
        @property
        def capabilities(self) -> Any:
            from deltaworks.process.sink import Capabilities  # noqa: PLC0415

            return Capabilities()

    world = make_world(seed=1, has_lookup=False)
    app = order_app(Plain(world.sink.file), world.labels, has_lookup=False)

    app.window(time="day", size=timedelta(days=1), orders=count())

    with pytest.raises(NotShareableError, match=r"(?s)2 reasons.*window 'window'.*'table'.*older document"):
        Runner.open(app, config=world.config("a"), name="orders")
