"""A shop with items and parts, an app that shows the items, and ways to lose changes of it."""

from collections.abc import Sequence
from typing import TypedDict

import pyarrow as pa
from servers.postgres import Database

from deltaworks import operate
from deltaworks.change import ChangeBatch
from deltaworks.config import Config
from deltaworks.log.change_log import StoredGroup
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search.spec import SearchIndex

ROWS = 50_000
LOST = 5


class Item(TypedDict):
    id: int
    title: str
    kind: int


class Part(TypedDict):
    part_id: int


class Shown(TypedDict):
    id: int
    title: str


def an_app() -> App:
    shop = Source("shop")
    items = App("items", key="id", sources=[shop.table("item", schema=Item), shop.table("part", schema=Part)])

    @items.filter
    def is_wanted(item: Entity[Item]) -> bool:
        return item.after["kind"] >= 3

    @items.transform
    def document(item: Entity[Item]) -> Shown:
        return {"id": item.after["id"], "title": item.after["title"]}

    items.sink(SearchIndex("items", text={"title": 1.0}))
    items.sink(LakeTable("items", schema=Shown))
    return items


def fill(database: Database, rows: int = ROWS) -> None:
    """Three in ten are filtered out."""
    database.execute(f"insert into item select i, 'item ' || i, i % 10 from generate_series(1, {rows}) i")


def bring_through(config: Config) -> None:
    operate.capture(config, "shop")
    operate.process(config, "items")
    operate.load(config, "shop")
    operate.load(config, "items")


def without(batches: Sequence[ChangeBatch], keys: set[int], gone: list[int]) -> tuple[ChangeBatch, ...]:
    """The batches without the changes of these keys, each lost once."""
    kept = []
    for batch in batches:
        ids = batch.rows.column("id").to_pylist() if "id" in batch.schema.key else []
        here = {key for key in ids if key in keys and key not in gone}
        gone += here
        places = [place for place, key in enumerate(ids) if key not in here]
        left = ChangeBatch(batch.schema, batch.rows.take(pa.array(places, pa.int64()))) if here else batch
        if len(left):
            kept.append(left)
    return tuple(kept)


def of_group(group: StoredGroup, keys: set[int], gone: list[int]) -> StoredGroup:
    return StoredGroup(group.header, without(group.batches, keys, gone))
