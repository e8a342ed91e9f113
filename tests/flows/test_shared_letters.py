"""Dead letters of an app whose members run on one machine: seen, retried and dropped wherever they are held."""

import json
import signal
from collections import Counter
from datetime import UTC, datetime

import dagster as dg
import pytest
from flows.chain import wait
from flows.shared_orders import ORDER
from flows.shared_shop import ORDERS, SHARES, Shop, letters_of_two
from process.material import update

from assets.dead import dead_letters
from deltaworks import operate
from deltaworks.operate.asking import RequestRefusedError
from deltaworks.operate.freshness import AgeCollector, app_freshness
from deltaworks.process.shared.shares import share_of
from resources.deltaworks_config import DeltaworksConfig

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(180)]


def test_letters_of_all_members_are_listed_retried_and_dropped_where_they_are_held(shop: Shop) -> None:
    letters_of_two(shop)

    listed = shop.dead("ls", "orders").stdout
    assert all(name in listed for name in shop.letters().values())
    for order, member in shop.letters().items():
        [letter] = json.loads(shop.dead("show", "orders", str(order), "--rows").stdout)["letters"]
        assert (letter["key"], letter["member"]) == (order, member)

    # One of each member is mended, one of each is given up.
    by_member = {name: [key for key, at in shop.letters().items() if at == name] for name in shop.letters().values()}
    mended, dropped = ([keys[place] for keys in by_member.values()] for place in (0, 1))
    shop.refuse(*set(range(ORDERS)) - set(mended))
    answer = shop.dead("retry", "orders", *map(str, mended))
    assert (answer.exit_code, "retry of 2 entities, by 2 members here" in answer.stdout) == (0, True), answer.output
    wait(lambda: shop.sink.bodies().keys() == set(mended), what="what was mended in the sink")
    assert shop.dead("drop", "orders", *map(str, dropped)).exit_code == 0
    assert shop.dead("drop", "orders", *map(str, dropped)).exit_code == 1
    assert shop.letters().keys() == set(range(ORDERS)) - {*mended, *dropped}
    done = dg.materialize(
        [dead_letters("orders", shop.config())], resources={"deltaworks": DeltaworksConfig(path=str(shop.path()))}
    )
    [materialized] = done.get_asset_materialization_events()
    assert materialized.materialization.metadata["dagster/row_count"].value == ORDERS - 4

    # On another machine, which is told how many there are and where.
    assert shop.dead("ls", "orders", home="elsewhere").stdout.count(": run this on its machine") == 2
    left = next(iter(shop.letters()))
    refused = shop.dead("show", "orders", str(left), home="elsewhere").exception
    assert isinstance(refused, operate.NoDeadLetterError)
    assert shop.letters()[left] in str(refused)
    answer = shop.dead("retry", "orders", str(left), home="elsewhere")
    assert (answer.exit_code, shop.letters()[left] in answer.stdout) == (1, True)


def test_letters_of_a_member_that_died_are_listed_until_who_takes_over_tries_them_again(shop: Shop) -> None:
    letters_of_two(shop)
    by_member = Counter(shop.letters().values())
    wait(lambda: told_dead(shop) == by_member, what="the word of both members")
    died = shop.end("b", signal.SIGKILL)
    held = [order for order, member in shop.letters().items() if member == died]

    # Nobody has its shares yet, and whoever takes them tries again: what was dropped now would come back.
    assert len(shop.letters()) == ORDERS
    [gone] = [each for each in shop.here() if each.name == died]
    assert gone.text.startswith("died after 20")
    assert {share_of(order, shares=SHARES) for order in held} <= set(gone.shares)
    assert gone.text.endswith(f"shares {' '.join(map(str, gone.shares))} wait for a member")
    [row] = [row for row in operate.status(shop.config()) if row.what == f"app orders, {died}"]
    assert row.state.endswith(gone.text)
    assert told_dead(shop) == by_member
    refused = shop.dead("drop", "orders", "--all").exception
    assert isinstance(refused, RequestRefusedError)
    assert died in str(refused)
    assert len(shop.letters()) == ORDERS

    wait(lambda: died not in shop.letters().values() and len(shop.letters()) == ORDERS, what="the other's letters")
    assert died not in {each.name for each in shop.here()}
    # All of one share, so that nothing holds the share back: what was dropped is done with, whoever takes it.
    dropped = [order for order in held if share_of(order, shares=SHARES) == share_of(held[0], shares=SHARES)]
    kept = next(order for order in held if order not in dropped)
    assert shop.dead("drop", "orders", *map(str, dropped)).exit_code == 0

    # Without a member the command is one: all but what was dropped leaves.
    left = shop.end("a", signal.SIGTERM)
    [gone] = [each for each in shop.here() if each.name == left]
    assert gone.text.startswith("left at 20")
    assert gone.text.endswith("shares 0 1 2 3 4 5 wait for a member")
    assert set(shop.letters().values()) == {left}
    assert isinstance(shop.dead("drop", "orders", str(kept)).exception, RequestRefusedError)
    shop.refuse(kept)
    answer = shop.dead("retry", "orders")
    assert answer.exit_code == 0, answer.output
    assert (
        f"retry of {ORDERS - len(dropped)} entities, 1 of them wait or are dead letters, by this run" in answer.stdout
    )
    assert shop.sink.bodies().keys() == set(range(ORDERS)) - {kept, *dropped}
    assert shop.letters().keys() == {kept}

    # What was dropped stays dropped, until its next change.
    shop.feed.commit(update(ORDER, order_id=dropped[0], status="paid"))
    shop.refuse()
    operate.process(shop.config(), "orders")
    assert shop.sink.bodies().keys() == set(range(ORDERS)) - set(dropped[1:])


def told_dead(shop: Shop) -> dict[str, float]:
    """How many letters the metrics of any member say that each has."""
    fresh = app_freshness(shop.config(), "orders", log_age_s=0.0, now=datetime.now(UTC))
    samples = [sample for family in AgeCollector(shop.config(), "orders").of(fresh) for sample in family.samples]
    return {each.labels["member"]: each.value for each in samples if each.labels.get("standing") == "dead"}
