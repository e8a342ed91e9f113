"""Apps: changes per second beside bytewax and quixstreams, in turn, each in its own fastest form doing the same work.

| work     | what it does                                                                            |
|----------|-----------------------------------------------------------------------------------------|
| rows     | filter and transform in Python functions, a change at a time                            |
| tables   | the same, vectorised: `arrow` and `sql` steps; bytewax over record batches              |
| shuffled | the same, vectorised, of a million films in any order, where `tables` has each one once |
| enrich   | a name for each change from an HTTP service that takes 5 ms, 100 ids a call, 256 at once |

Ours reads the durable log with its checksums, keeps the newest change of each key, proves what it took (a hash of every
change), versions documents and saves its checkpoint. bytewax reads the same changes from an Arrow stream, keeps the
newest of each key in a batch and carries its version; it has no checksum, no proof and no checkpoint. quixstreams
changes one row at a time. Ours calls the service over `http_client`, which ships with it; the peers over httpx's own
pool. A rate is per second of one process that has one core to itself; quixstreams is its compiled dataframe without the
broker that its engine needs. The added latency is from the append to the log until the sink is flushed, at half of the
rate of rows.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from measure import Figure, arguments, report

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import Config
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.operate import lease
from deltaworks.position import Lsn
from deltaworks.process.app import App, Source
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.connections import http_client
from deltaworks.process.entity import Entity
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Capabilities, Document
from deltaworks.schema import Column, TableName, TableSchema

HERE = Path(__file__).resolve().parent
GROUP = 10_000
COUNTS = {"rows": 300_000, "tables": 9_000_000, "shuffled": 9_000_000, "enrich": 200_000}
SHUFFLED_FILMS = 1_000_000
QUIX_CALLS = 400
LATENCY_S = 8.0
FILM = TableSchema(
    name=TableName.parse("film"),
    key=("film_id",),
    columns=(
        Column(name="film_id", type=pa.int32(), source_type="integer", nullable=False),
        Column(name="title", type=pa.string(), source_type="text", nullable=False),
        Column(name="status", type=pa.string(), source_type="text", nullable=False),
        Column(name="price", type=pa.int32(), source_type="integer", nullable=False),
    ),
)


class Film(TypedDict):
    """What the apps read."""

    title: str
    status: str
    price: int


class Counting:
    """A sink that counts; takes columns too."""

    name = "counting"
    capabilities = Capabilities(is_columnar=True)

    def __init__(self) -> None:
        self.count = 0

    def open(self, **_: Any) -> "Counting":
        return self

    def write(self, documents: Sequence[Document]) -> None:
        self.count += len(documents)

    def write_batch(self, batch: DocumentBatch) -> None:
        self.count += len(batch)

    def flush(self, *, up_to: Lsn) -> Sequence[Any]:
        return ()

    def close(self) -> None:
        pass


def row_app() -> App:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

    @films.filter
    def keep(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    @films.transform
    def change(film: Entity[Film]) -> dict[str, Any]:
        return {"title": film.after["title"].upper(), "gross": film.after["price"] * 1.2}

    return films


def arrow_app() -> App:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

    @films.arrow
    def change(table: pa.Table) -> pa.Table:
        kept = table.filter(pc.not_equal(table["status"], "draft"))
        gross = pc.multiply(kept["price"], 1.2)
        return pa.table({"_key": kept["_key"], "title": pc.utf8_upper(kept["title"]), "gross": gross})

    return films


def sql_app() -> App:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    films.sql("select _key, upper(title) as title, price * 1.2 as gross from film where status <> 'draft'")
    return films


def enrich_app() -> App:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])

    @films.client
    async def names(settings: Mapping[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
        async with http_client(settings["url"], max_connections=256) as client:
            yield client

    @films.enrich(into="name", key=lambda film: film.key, batch=100, concurrency=256)
    async def name(ids: list[int], names: httpx.AsyncClient) -> dict[int, str]:
        answer = await names.post("/", json={"ids": ids})
        return {int(id_): found for id_, found in answer.json().items()}

    @films.transform
    def named(film: Entity[Film]) -> dict[str, Any]:
        return {**film.after, "name": film["name"]}

    return films


def changes(start: int, count: int, *, position: int, is_shuffled: bool = False) -> ChangeBatch:
    """Updates of as many films, ten to a transaction, from this position on."""
    ids = np.arange(start, start + count)
    if is_shuffled:
        ids = np.random.default_rng(start).integers(0, SHUFFLED_FILMS, count)
    commit = position + np.arange(count) // 10
    columns = {
        "_op": pa.array(["u"] * count),
        "_commit": pa.array(commit, pa.uint64()),
        "_ordinal": pa.array(np.arange(count) % 10, pa.uint32()),
        "_txid": pa.array(commit, pa.uint64()),
        "_committed_at": pa.array(np.full(count, time.time_ns() // 1000), pa.timestamp("us", "UTC")),
        "film_id": pa.array(ids, pa.int32()),
        "title": pa.array([f"film number {number}" for number in ids]),
        "status": pa.array(np.where(ids % 4 == 0, "draft", "released")),
        "price": pa.array(ids % 100, pa.int32()),
    }
    schema = change_schema(FILM)
    arrays = [columns[field.name] if field.name in columns else pa.nulls(count, field.type) for field in schema]
    return ChangeBatch(FILM, pa.RecordBatch.from_arrays(arrays, schema=schema))


@dataclass(frozen=True, slots=True)
class Rate:
    """Changes per second of time, and per second of the core."""

    wall: float
    core: float


def config_of(folder: Path, url: str) -> Config:
    return Config.model_validate(
        {
            "home": folder,
            "sources": {"studio": {"kind": "postgres", "dsn": "none", "tables": ["film"]}},
            "apps": {"films": {"module": "none:none", "source": "studio", "settings": {"url": url}}},
        }
    )


def fill(folder: Path, count: int, *, is_shuffled: bool = False) -> Path:
    """The same changes as a log in `folder` and as an Arrow stream, whose path is given."""
    path = folder / "changes.arrow"
    end = Lsn(0)
    batches = [changes(start, GROUP, position=start + 1, is_shuffled=is_shuffled) for start in range(0, count, GROUP)]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batches[0].rows.schema) as stream:
        for batch in batches:
            stream.write_batch(batch.rows)
    with LocalLogWriter.open(folder / "log" / "studio") as writer:
        for number, batch in enumerate(batches):
            position = Lsn((number + 1) * GROUP)
            writer.append(Group(batches=(batch,), position=position, previous_position=end))
            end = position
    # Else the first who reads them would share the machine with the writing of them.
    os.sync()
    return path


APPS = {"rows": row_app, "arrow": arrow_app, "shuffled": arrow_app, "sql": sql_app, "enrich": enrich_app}


def run_ours(name: str, folder: Path, count: int, url: str) -> Rate:
    """In a process of its own, as every peer."""
    command = [sys.executable, __file__, "--ours", name, str(folder), str(count), url]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return Rate(**done)


def ours(name: str, folder: Path, count: int, url: str) -> Rate:
    app, sink = APPS[name](), Counting()
    app.sink(sink)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        (Path(home) / "log").symlink_to(folder / "log")
        with Runner.open(app, config=config_of(Path(home), url), name="films") as runner:
            began, cpu = time.perf_counter(), time.process_time()
            runner.drain()
            seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    # Of a film that changed several times in a range the last change is enough.
    assert sink.count == count or (name == "shuffled" and sink.count >= SHUFFLED_FILMS), f"{sink.count} documents"
    return Rate(count / seconds, count / cpu_s)


def warm_up(name: str, url: str) -> None:
    """Load what is loaded at its first use, as a service has it behind it; see `lease.warm_up`."""
    with tempfile.TemporaryDirectory(prefix="deltaworks-") as folder:
        fill(Path(folder), GROUP)
        ours(name, Path(folder), GROUP, url)
    lease.warm_up()


def run_peer(python: Path, peer: str, work: str, path: Path, count: int, url: str = "") -> Rate:
    command = [str(python), str(HERE / "process_peers.py"), peer, work, str(path), url]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return Rate(count / done["seconds"], count / done["cpu_s"])


def latency(folder: Path, rate: float) -> float:
    """The 99th percentile of the added latency in ms, at this many changes per second from another process."""
    command = [sys.executable, __file__, "--feed", str(folder / "log" / "studio"), str(int(rate))]
    warm_up("rows", "")
    app = row_app()
    app.sink(Counting())
    stop = threading.Event()
    with Runner.open(app, config=config_of(folder, ""), name="films") as runner, ThreadPoolExecutor(1) as pool:
        followed = pool.submit(runner.follow, stop)
        subprocess.run(command, check=True)
        stop.set()
        return followed.result().log_lag.p99_s * 1000


def feed(folder: Path, rate: int) -> None:
    """Append changes at this rate, a group every 10 ms, as a capture that is busy would."""
    size = max(1, rate // 100)
    batches = [changes(number * size, size, position=number * size + 1) for number in range(int(LATENCY_S * 100))]
    end = Lsn(0)
    with LocalLogWriter.open(folder) as writer:
        began = time.monotonic()
        for number, batch in enumerate(batches):
            time.sleep(max(0.0, began + number / 100 - time.monotonic()))
            position = Lsn((number + 1) * size)
            writer.append(Group(batches=(batch,), position=position, previous_position=end))
            end = position


@contextmanager
def service() -> Iterator[str]:
    """The names of films, 5 ms after they were asked for, in a process of its own."""
    command = [sys.executable, __file__, "--service"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def serve() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                ids = json.loads(await reader.readexactly(length))["ids"]
                await asyncio.sleep(0.005)
                body = json.dumps({str(id_): f"name of {id_}" for id_ in ids}).encode()
                lines = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(lines.encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def peers_python() -> Path:
    """The Python that has the peers, in a folder that is made once."""
    place = HERE.parent / ".bench" / "process"
    python = place / "bin" / "python"
    if not python.exists():
        project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        peers = [each for each in project["optional-dependencies"]["bench"] if each.startswith(("bytewax", "quix"))]
        wanted = [*peers, f"pyarrow=={pa.__version__}", "httpx"]
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        subprocess.run(install, check=True)
    return python


def main() -> int:
    """Run each work with everyone in turn."""
    if "--service" in sys.argv:
        asyncio.run(serve())
    if "--ours" in sys.argv:
        name, folder, count, url = sys.argv[sys.argv.index("--ours") + 1 :]
        warm_up(name, url)
        print(json.dumps(asdict(ours(name, Path(folder), int(count), url))))
        return 0
    if "--feed" in sys.argv:
        place = sys.argv.index("--feed")
        feed(Path(sys.argv[place + 1]), int(sys.argv[place + 2]))
        return 0
    options = arguments(__doc__ or "")
    python = peers_python()
    rates: dict[str, list[Rate]] = {}
    lags: list[float] = []
    with service() as url:
        for _ in range(options.repeats):
            for work, runs in _runs(python, url).items():
                with tempfile.TemporaryDirectory(prefix="deltaworks-") as home:
                    count = COUNTS[work]
                    path = fill(Path(home), count, is_shuffled=work == "shuffled")
                    for name, run in runs.items():
                        rates.setdefault(name, []).append(run(Path(home), path, count))
            with tempfile.TemporaryDirectory(prefix="deltaworks-") as home:
                lags.append(latency(Path(home), rates["rows: ours"][-1].wall / 2))
    return report("Apps", [*_figures(rates), _lag_figure(lags)], path=options.json)


def _runs(python: Path, url: str) -> dict[str, dict[str, Callable[[Path, Path, int], Rate]]]:
    def ours(name: str) -> Callable[[Path, Path, int], Rate]:
        return lambda home, _, count: run_ours(name, home, count, url)

    def peer(name: str, work: str) -> Callable[[Path, Path, int], Rate]:
        return lambda _, path, count: run_peer(python, name, work, path, count, url)

    def few(home: Path, _: Path, __: int) -> Rate:
        # It asks for one id at a time, so a small part of the changes says how fast it is.
        part = home / "few"
        part.mkdir()
        batch = changes(0, QUIX_CALLS, position=1).rows
        with pa.OSFile(str(part / "few.arrow"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        return run_peer(python, "quixstreams", "enrich", part / "few.arrow", QUIX_CALLS, url)

    return {
        "rows": {
            "rows: ours": ours("rows"),
            "rows: bytewax": peer("bytewax", "rows"),
            "rows: quixstreams": peer("quixstreams", "rows"),
        },
        "tables": {
            "tables: ours, arrow": ours("arrow"),
            "tables: ours, sql": ours("sql"),
            "tables: bytewax": peer("bytewax", "tables"),
        },
        "shuffled": {
            "shuffled: ours": ours("shuffled"),
            "shuffled: bytewax": peer("bytewax", "tables"),
        },
        "enrich": {
            "enrich: ours": ours("enrich"),
            "enrich: bytewax": peer("bytewax", "enrich"),
            "enrich: quixstreams": few,
        },
    }


def _figures(rates: Mapping[str, Sequence[Rate]]) -> Iterator[Figure]:
    goals = {"rows: ours": 50e3, "tables: ours, arrow": 1e6, "tables: ours, sql": 1e6, "enrich: ours": 20e3}
    for name, found in rates.items():
        yield Figure(
            name=name,
            values=[rate.wall for rate in found],
            unit="changes/s",
            goal=goals.get(name),
            smaller_is_better=False,
        )
        yield Figure(name=f"{name}, core", values=[rate.core for rate in found], unit="changes/core-s")
    for peer in [name for name in rates if "ours" not in name]:
        work = peer.partition(":")[0]
        best = "tables: ours, arrow" if work == "tables" else f"{work}: ours"
        ratios = [our.wall / their.wall for our, their in zip(rates[best], rates[peer], strict=True)]
        # Of keys in any order ours keeps in its ledger which version of each left; bytewax keeps nothing.
        goal = None if work == "shuffled" else 1
        yield Figure(name=f"{best} / {peer}", values=ratios, unit="×", goal=goal, smaller_is_better=False)


def _lag_figure(lags: Sequence[float]) -> Figure:
    return Figure(name="added latency at half of the rate of rows, p99", values=lags, unit="ms", goal=50)


if __name__ == "__main__":
    sys.exit(main())
