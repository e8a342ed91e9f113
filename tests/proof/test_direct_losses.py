"""An app that keeps no rows: what its sinks lose or set back is named and repaired, and nothing else is."""

import random
import sys
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from proof.shop import LOST, Item, Shown, bring_through, fill
from servers.postgres import Database

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.process.app import App, Source
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.direct.reducer import is_direct, is_vectorised
from deltaworks.process.entity import Entity
from deltaworks.process.ledger.ledger import ROW_BY_ROW
from deltaworks.process.sink import Document
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search.spec import SearchIndex
from deltaworks.testing.faults import lose_at

ROWS = 4 * ROW_BY_ROW


def row_app() -> App:
    app = App("items", key="id", sources=[Source("shop").table("item", schema=Item)])

    @app.filter
    def is_wanted(item: Entity[Item]) -> bool:
        return item.after["kind"] >= 3

    @app.transform
    def document(item: Entity[Item]) -> Shown:
        return {"id": item.after["id"], "title": item.after["title"]}

    return app


def table_app() -> App:
    app = App("items", key="id", sources=[Source("shop").table("item", schema=Item)])

    @app.arrow
    def wanted(items: pa.Table) -> pa.Table:
        return items.filter(pc.greater_equal(items["kind"], 3)).select(["_key", "id", "title"])

    return app


@pytest.fixture(params=["rows", "tables"])
def app(request: pytest.FixtureRequest, config: Config, monkeypatch: pytest.MonkeyPatch) -> App:
    made = row_app() if request.param == "rows" else table_app()
    assert is_direct(made)
    assert is_vectorised(made) == (request.param == "tables")
    made.sink(SearchIndex("items", text={"title": 1.0}))
    made.sink(LakeTable("items", schema=Shown))
    monkeypatch.setattr(sys.modules["items_of_the_shop"], "items", made)
    return made


class Thief:
    """Takes documents of some keys away before the first sink that has them, once."""

    def __init__(self, keys: set[int]) -> None:
        self.keys = keys
        self.gone: set[int] = set()

    def of_rows(self, documents: list[Document]) -> list[Document]:
        here = {each.key for each in documents} & self.keys - self.gone
        self.gone |= here
        return [each for each in documents if each.key not in here]

    def of_columns(self, batch: DocumentBatch) -> DocumentBatch:
        here = {*batch.meta.column("_key").to_pylist(), *batch.gone.column("_key").to_pylist()} & self.keys - self.gone
        self.gone |= here
        taken = pa.array(list(here), batch.meta.schema.field("_key").type)
        is_made, is_gone = (pc.invert(pc.is_in(table["_key"], taken)) for table in (batch.meta, batch.gone))
        return DocumentBatch(
            meta=batch.meta.filter(is_made), bodies=batch.bodies.filter(is_made), gone=batch.gone.filter(is_gone)
        )


def bring_through_with(thief: Thief, app: App, config: Config) -> None:
    seam, change = ("process.write_batch", thief.of_columns) if is_vectorised(app) else ("process.write", thief.of_rows)
    operate.capture(config, "shop")
    with lose_at(seam, change):
        operate.process(config, "items")
    operate.load(config, "shop")
    operate.load(config, "items")
    assert thief.gone == thief.keys


def named(audit: operate.Audit) -> dict[str, set[int]]:
    return {each.loss.hop: {int(key) for keys in each.loss.keys.values() for (key,) in keys} for each in audit.found}


@pytest.mark.parametrize("rows", [ROWS, 200])
def test_what_a_sink_lost_or_holds_too_old_is_named_and_repaired(
    app: App, config: Config, database: Database, dice: random.Random, rows: int
) -> None:
    fill(database, rows)
    wanted = [key for key in range(1, rows + 1) if key % 10 >= 3]
    lost = set(dice.sample(wanted, LOST))
    bring_through_with(Thief(lost), app, config)
    found = named(operate.audit(config, "shop"))
    # Columns are taken away before both sinks, rows before the one that is written first.
    assert found.pop("sink items/items") == lost
    assert not found
    operate.repair(config, "shop")
    bring_through(config)
    assert operate.audit(config, "shop").is_balanced

    # Now an update, a row that is filtered out from now on, and one that is deleted do not reach the sinks.
    reverted = set(dice.sample(sorted(set(wanted) - lost), LOST))
    updated, hidden, deleted, *_ = reverted
    database.execute(
        "update item set title = 'new'",
        f"update item set kind = 0 where id = {hidden}",
        f"delete from item where id = {deleted}",
    )
    bring_through_with(Thief(reverted), app, config)
    audit = operate.audit(config, "shop", is_since_last=True)
    assert named(audit) == {"sink items/items": reverted}
    assert updated in reverted
    operate.repair(config, "shop")
    bring_through(config)
    again = operate.audit(config, "shop", is_since_last=True)
    assert again.is_balanced
    (sink, lake) = again.sinks
    assert (sink.documents, lake.documents, sink.missing) == (rows, rows, 0)


def test_filters_updates_and_restarts_raise_no_alarm_and_the_entities_add_up(
    app: App, config: Config, database: Database, dice: random.Random
) -> None:
    for part in range(4):
        first, last = part * ROW_BY_ROW + 1, (part + 1) * ROW_BY_ROW
        database.execute(f"insert into item select i, 'item', i % 10 from generate_series({first}, {last}) i")
        database.execute(
            f"update item set kind = kind + 3 where id % 7 = {part}", f"delete from item where id % 97 = {part}"
        )
        dice.choice([bring_through, lambda config: operate.capture(config, "shop")])(config)
        assert operate.audit(config, "shop").is_balanced
    bring_through(config)
    audit = operate.audit(config, "shop")
    assert audit.is_balanced
    counts: dict[str, Any] = {
        name: sum(getattr(each, name) for each in audit.entities["items"]) for name in ("left", "filtered", "gone")
    }
    ((live, shown),) = database.rows("select count(*), count(*) filter (where kind >= 3) from item")
    assert (counts["left"], counts["filtered"]) == (shown, live - shown)
    # What came and went between two runs left no trace of its filter.
    assert counts["left"] + counts["filtered"] + counts["gone"] == audit.sinks[0].documents
