"""An app that several processes run, and whose step refuses the orders that a file names.

Its settings say where the file is, and where the table with its documents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from process.material import INT, TEXT, table_schema
from process.shared_table import SharedTable, SharedTableWriter

from deltaworks.config import Config
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity

ORDER = table_schema("purchase", "order_id", order_id=INT, status=TEXT)
shop = Source("shop")


class Order(TypedDict):
    status: str


class Table(SharedTable):
    def __init__(self) -> None:
        super().__init__(Path("table"))

    def open(self, *, app: str, key: str, config: Config) -> SharedTableWriter:  # type: ignore[override]
        return SharedTableWriter(Path(str(config.app(app).settings["table"])), "")


orders = App("orders", key="order_id", sources=[shop.table("purchase", schema=Order)])


@orders.client
def refused(settings: Mapping[str, Any]) -> Path:
    return Path(settings["refused"])


@orders.enrich(into="number", key=lambda order: order.key, batch=1)
async def numbered(ids: list[int], refused: Path) -> dict[int, int]:
    if set(map(str, ids)) & set(refused.read_text().split()):
        raise ValueError
    return {id_: id_ for id_ in ids}


@orders.transform
def document(order: Entity[Order]) -> dict[str, Any]:
    return {"status": order.after["status"]}


orders.sink(Table())
