"""The page of apps over a shared one: every member, here and elsewhere, with totals on top."""

import signal

import pytest
from flows.chain import wait
from flows.shared_shop import ORDERS, SHARES, Shop, letters_of_two
from serve.conftest import InProcess

from deltaworks.serve.http import build

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(180)]


class Page(InProcess):
    """The page of apps on a machine of the shop."""

    def __init__(self, shop: Shop, home: str = "home") -> None:
        super().__init__(build(shop.config(home)))

    def app(self) -> dict[str, object]:
        [app] = self.ask("GET", "/api/apps").json()["apps"]
        return dict(app)

    def members(self) -> dict[str, dict[str, object]]:
        return {member["name"]: member for member in self.ask("GET", "/api/apps").json()["apps"][0]["members"]}


def test_every_member_is_shown_and_its_letters_are_retried_and_dropped(shop: Shop) -> None:
    letters_of_two(shop)
    page = Page(shop)
    names = set(shop.letters().values())
    wait(lambda: {each["state"] for each in page.members().values()} == {"running"}, what="both members on the page")
    wait(lambda: page.app()["live"] is not None, what="the rates of both")

    app, members, text = page.app(), page.members(), page.get("/apps").text
    assert members.keys() == names
    assert sorted(share for each in members.values() for share in each["shares"]) == list(range(SHARES))
    assert {name: each["dead"] for name, each in members.items()} == {
        name: list(shop.letters().values()).count(name) for name in names
    }
    assert (app["state"], app["dead"], app["behind"]) == ("running", ORDERS, 0)
    assert "2 members here" in text
    assert all(text.count(name) > 1 for name in names)

    # Whichever member holds it.
    of_each = {member: order for order, member in shop.letters().items()}
    shop.refuse(*set(range(ORDERS)) - set(of_each.values()))
    for order in of_each.values():
        assert page.ask("POST", f"/apps/orders/retry?key={order}").status_code == 303
    wait(lambda: shop.sink.bodies().keys() == set(of_each.values()), what="what was mended in the sink")
    of_each = {member: order for order, member in shop.letters().items()}
    for order in of_each.values():
        assert page.ask("POST", f"/apps/orders/drop?key={order}").status_code == 303
    wait(lambda: page.app()["dead"] == ORDERS - 4, what="fewer letters")

    # On another machine they are seen by what they say of themselves.
    there = Page(shop, "elsewhere")
    wait(lambda: there.app()["dead"] == ORDERS - 4, what="their letters elsewhere")
    assert {name: each["state"] for name, each in there.members().items()} == dict.fromkeys(names, "elsewhere")
    assert "0 members here · 2 elsewhere" in there.get("/apps").text
    assert "run this on its machine" in there.ask("POST", f"/apps/orders/drop?key={next(iter(shop.letters()))}").text


def test_a_member_that_died_is_shown_until_others_have_its_shares(shop: Shop) -> None:
    letters_of_two(shop)
    page = Page(shop)
    wait(lambda: len(page.members()) == 2, what="both members on the page")
    died = shop.end("b", signal.SIGKILL)
    held = [order for order, member in shop.letters().items() if member == died]

    gone, text = page.members()[died], page.get("/apps").text
    assert (gone["state"], gone["dead"], gone["shares"]) == ("stopped", len(held), [])
    assert str(gone["text"]).startswith("died after 20")
    assert "wait for a member" in text
    assert "tried again by whoever takes its share" in text
    assert page.app()["dead"] == ORDERS
    answer = page.ask("POST", f"/apps/orders/drop?key={held[0]}")
    assert (answer.status_code, "has ended: whoever takes its shares" in answer.text) == (409, True)

    wait(lambda: died not in page.members() and page.app()["dead"] == ORDERS, what="the letters with the other one")
    assert page.ask("POST", f"/apps/orders/drop?key={held[0]}").status_code == 303
    wait(lambda: page.app()["dead"] == ORDERS - 1, what="one letter less")

    shop.end("a", signal.SIGTERM)
    wait(lambda: page.app()["state"] == "stopped", what="an app without a member")
    wait(lambda: "left at 20" in page.get("/apps").text, what="what the group heard of it last")
    answer = page.ask("POST", "/apps/orders/retry")
    assert (answer.status_code, "deltaworks process orders" in answer.text) == (409, True)
