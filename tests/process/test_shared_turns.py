"""Transitions of an app with several members: each is told in the order of its key, whoever has its share."""

import os
from collections.abc import Callable

import pytest
from process.material import create, update
from process.shared_world import ORDER, ORDERS, SHARES, Order, World, do_something

from deltaworks.process import entities
from deltaworks.process.entity import Transition
from deltaworks.process.shared import sharing
from deltaworks.process.shared.shares import share_of


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
            do_something(world, can_freeze=False)
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
