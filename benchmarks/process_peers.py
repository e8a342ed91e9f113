"""The peers' side of benchmarks/process.py: the same work, each in its own fastest form. Runs in their own venv.

`process_peers.py PEER WORK FILE [URL]` prints `{"seconds": …, "cpu_s": …, "rows": …}`; FILE is an Arrow stream of the
changes. bytewax runs its own engine on one worker, and takes the newest change of each key of a batch, as ours does.
quixstreams needs a broker for its engine; what is timed here is its compiled dataframe alone, called with rows in
memory, so that no broker's time counts against it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ["film_id", "title", "status", "price", "_commit", "_ordinal"]
CALL_IDS = 100
CONCURRENCY = 256


def change(row: dict[str, Any]) -> tuple[int, tuple[int, int], dict[str, Any] | None]:
    """What a sink needs to refuse what is stale: key, version, and the document or that there is none."""
    body = {"title": row["title"].upper(), "gross": row["price"] * 1.2} if row["status"] != "draft" else None
    return row["film_id"], (row["_commit"], row["_ordinal"]), body


def change_rows(rows: list[dict[str, Any]]) -> list[tuple[int, tuple[int, int], dict[str, Any] | None]]:
    """The last change of each key of a batch, changed."""
    return [change(row) for row in {row["film_id"]: row for row in rows}.values()]


def newest_of_each(table: pa.Table) -> pa.Table:
    """The last change of each key of a batch: what is older would only be written over."""
    places = pa.array(range(table.num_rows), pa.int64())
    grouped = table.select(["film_id"]).append_column("place", places).group_by("film_id", use_threads=False)
    return table.take(grouped.aggregate([("place", "max")])["place_max"])


def change_table(batch: pa.RecordBatch) -> tuple[pa.Table, pa.Table]:
    """The documents and the tombstones of a batch, with their keys and versions."""
    table = newest_of_each(pa.Table.from_batches([batch]))
    is_kept = pc.not_equal(table["status"], "draft")
    kept, gone = table.filter(is_kept), table.filter(pc.invert(is_kept))
    made = {"title": pc.utf8_upper(kept["title"]), "gross": pc.multiply(kept["price"], 1.2)}
    meta = ["film_id", "_commit", "_ordinal"]
    return pa.table({**{name: kept[name] for name in meta}, **made}), gone.select(meta)


def batches(path: str) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield batch.select(COLUMNS)


class Asking:
    """Asks the service for the names of many ids, some calls at once."""

    def __init__(self, url: str) -> None:
        import httpx

        self.runner = asyncio.Runner()
        limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
        self.client = httpx.AsyncClient(base_url=url, limits=limits)

    async def _ask(self, ids: Sequence[int]) -> dict[str, str]:
        answer = await self.client.post("/", json={"ids": ids})
        return answer.json()

    async def _ask_all(self, ids: Sequence[int]) -> dict[str, str]:
        parts = [ids[start : start + CALL_IDS] for start in range(0, len(ids), CALL_IDS)]
        found = {}
        for names in await asyncio.gather(*(self._ask(part) for part in parts)):
            found.update(names)
        return found

    def enrich(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = self.runner.run(self._ask_all([row["film_id"] for row in rows]))
        return [{**row, "name": names[str(row["film_id"])]} for row in rows]


def run_bytewax(work: str, path: str, url: str) -> int:
    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.inputs import DynamicSource, StatelessSourcePartition
    from bytewax.outputs import DynamicSink, StatelessSinkPartition
    from bytewax.testing import run_main

    counted = [0]

    class Partition(StatelessSourcePartition):
        def __init__(self) -> None:
            self.batches = batches(path)

        def next_batch(self) -> list[Any]:
            batch = next(self.batches)
            return [batch] if work == "tables" else batch.to_pylist()

    class Source(DynamicSource):
        def build(self, step_id: str, worker_index: int, worker_count: int) -> Partition:
            return Partition()

    class Counting(StatelessSinkPartition):
        def write_batch(self, items: list[Any]) -> None:
            counted[0] += sum(len(made) + len(gone) for made, gone in items) if work == "tables" else len(items)

    class Sink(DynamicSink):
        def build(self, step_id: str, worker_index: int, worker_count: int) -> Counting:
            return Counting()

    flow = Dataflow("films")
    stream = op.input("in", flow, Source())
    if work == "tables":
        stream = op.map("change", stream, change_table)
    elif work == "rows":
        # One operator over batches beats `map` over single rows, so this is its fastest form.
        stream = op.flat_map_batch("change", stream, change_rows)
    else:
        asking = Asking(url)
        stream = op.flat_map_batch("enrich", stream, asking.enrich)
    op.output("out", stream, Sink())
    run_main(flow)
    return counted[0]


def run_quixstreams(work: str, path: str, url: str) -> int:
    from quixstreams.context import set_message_context
    from quixstreams.dataframe import StreamingDataFrame
    from quixstreams.dataframe.registry import DataFrameRegistry
    from quixstreams.models import MessageContext, Topic

    counted = [0]
    registry = DataFrameRegistry()
    frame = StreamingDataFrame(
        Topic("films"),
        registry=registry,
        processing_context=SimpleNamespace(producer=None),
        topic_manager=None,
        stream_id="films",
    )
    registry.register_root(frame)
    if work == "rows":
        frame = frame.apply(change)
    else:
        asking = Asking(url)
        frame = frame.apply(lambda row: asking.enrich([row])[0])

    def count(*_: Any) -> None:
        counted[0] += 1

    [run] = registry.compose_all(sink=count).values()
    set_message_context(MessageContext(topic="films", partition=0, offset=0, size=0))
    for batch in batches(path):
        for row in batch.to_pylist():
            run(row, row["film_id"], 0, None)
    return counted[0]


if __name__ == "__main__":
    peer, work, path = sys.argv[1:4]
    url = sys.argv[4] if len(sys.argv) > 4 else ""
    run = {"bytewax": run_bytewax, "quixstreams": run_quixstreams}[peer]
    began, cpu = time.perf_counter(), time.process_time()
    rows = run(work, path, url)
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "rows": rows}))
