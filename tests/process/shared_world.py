"""A shop and members of its app, moved by hand in one process: they join, leave, die and freeze when a test says."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from process.material import INT, TEXT, Feed, create, delete, table_schema, update
from process.memory_group import MemoryGroup, MemoryMembership
from process.shared_table import SharedTable

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.membership import MembershipLostError
from deltaworks.operate.sink_audit import differing
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.ledger.ledger import LedgerReader
from deltaworks.process.ledger.left_keys import LeftKeys
from deltaworks.process.ledger.stood import stood
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Document
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


def do_something(world: World, *, can_freeze: bool) -> None:
    """Change rows, then let one member join, leave, die, freeze or work."""
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
