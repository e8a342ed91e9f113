"""Members of one app, moved by hand: whatever happens, per key the sink ends at the reference and never goes back."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from process.material import create, update
from process.shared_world import ORDER, ORDERS, SHARES, World, do_something

from deltaworks import faults
from deltaworks.log.membership import MembershipLostError
from deltaworks.process import entities
from deltaworks.process.shared.shares import share_of


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
            do_something(world, can_freeze=can_freeze)
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
