"""Capture beside `pg_recvlogical` to /dev/null: the same WAL over copies of one slot, in turn.

The reader builds Arrow batches, alone and into the durable log. Then Debezium's embedded engine drains the same WAL
into a consumer that counts, and what each takes of the client's processor is compared over the second half, when both
are warm. Then the time from a commit to its durable group at 1,000 changes a second, and the memory that a transaction
far larger than it takes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import debezium
import psycopg
from measure import Figure, report
from pydantic import SecretStr

from deltaworks.capture.memory import leave_pandas_out
from deltaworks.capture.postgres import slot as slots
from deltaworks.capture.postgres.catalog import describe_relation
from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.connect import connect
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.postgres.replication import PostgresStream
from deltaworks.capture.postgres.warm import compile_loops
from deltaworks.capture.source import Slice
from deltaworks.change import MESSAGES
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import START, Lsn
from deltaworks.testing.postgres import PostgresServer, embedded_binaries

SETTINGS = {"max_wal_size": "16GB", "shared_buffers": "256MB", "max_replication_slots": "32", "autovacuum": "off"}
PUBLICATION = "benchmark"
WIDE_TYPES = (
    *("int", "bigint", "smallint", "boolean", "double precision", "real", "numeric(12,2)", "date", "timestamptz"),
    *("timestamp", "uuid", "text", "varchar(40)", "text", "int", "bigint", "numeric(20,4)", "text", "timestamptz"),
)
WIDE_VALUES = (
    *(
        "g",
        "g::bigint * 1000",
        "g % 30000",
        "g % 2 = 0",
        "g * 1.5",
        "g / 7.0",
        "g * 0.01",
        "date '2020-01-01' + g % 999",
    ),
    *("now()", "now()::timestamp", "gen_random_uuid()", "'name ' || g", "'title ' || g", "repeat('x', g % 30)", "-g"),
    *("g::bigint << 20", "g * 0.0001", "'status ' || g % 9", "now()"),
)


def make_changes(server: PostgresServer, *, narrow: int, wide: int) -> None:
    """Tables and a slot before, then the changes: half inserts, then updates and deletes, in large transactions."""
    columns = ", ".join(f"c{place} {kind}" for place, kind in enumerate(WIDE_TYPES))
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create table narrow (id bigint primary key, n int, v text, at timestamptz)")
        connection.execute(f"create table wide (id bigint primary key, {columns})")
        connection.execute("create table small (id bigint primary key, n int, v text, at timestamptz)")
        connection.execute("create table large (id bigint primary key, n int, v text, at timestamptz)")
        for name in ("narrow", "wide"):
            connection.execute(f"create publication {PUBLICATION}_{name} for table {name}")
        connection.execute(f"create publication {PUBLICATION} for table small, large")
        for name, rows, values in (
            ("narrow", narrow // 2, "g % 1000, 'value ' || g, now()"),
            ("wide", wide // 2, ", ".join(WIDE_VALUES)),
        ):
            connection.execute(f"select pg_create_logical_replication_slot('{name}', 'pgoutput')")
            piece = max(1, min(100_000, rows))
            for first in range(1, rows + 1, piece):
                connection.execute(
                    f"insert into {name} select g, {values} from generate_series({first}, {first + piece - 1}) g"
                )
            touched = "n = n + 1" if name == "narrow" else "c0 = c0 + 1"
            for first in range(1, rows + 1, piece):
                connection.execute(
                    f"update {name} set {touched} where id >= {first} and id < {first + piece} and id % 5 > 0"
                )
            connection.execute(f"delete from {name} where id % 5 = 0")
            connection.execute("select pg_logical_emit_message(true, 'end', '')")


@contextmanager
def copy_of(server: PostgresServer, slot: str) -> Iterator[str]:
    """A slot that reads the same WAL as `slot`."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"select pg_copy_logical_replication_slot('{slot}', 'taken')")
        yield "taken"
        # The last reader leaves a moment after its connection.
        deadline = time.monotonic() + 10
        while True:
            try:
                connection.execute("select pg_drop_replication_slot('taken')")
                return
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def end_of_wal(server: PostgresServer) -> str:
    """The position up to which everything is in the WAL."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        row = connection.execute("select pg_current_wal_lsn()::text").fetchone()
    return str(row[0]) if row else ""


def drained_by_server_tool(server: PostgresServer, slot: str, end: str) -> dict[str, float]:
    """pg_recvlogical to /dev/null, with the options that our reader asks for."""
    options = ["proto_version=2", "streaming=on", "messages=true", f"publication_names={PUBLICATION}_{slot}"]
    with copy_of(server, slot) as taken:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command: list[str | Path] = [
            embedded_binaries() / "pg_recvlogical",
            "-d",
            server.dsn(),
            "-S",
            taken,
            "--start",
            "--no-loop",
        ]
        command += [part for option in options for part in ("-o", option)]
        subprocess.run([*command, "-f", "/dev/null", "-E", end], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.monotonic() - began, "cpu_s": cpu}


def drained_by_us(
    server: PostgresServer, slot: str, end: str, *, log: Path | None = None, form: str = "text"
) -> dict[str, float]:
    """Our reader in a process of its own, which is warm before it begins."""
    with copy_of(server, slot) as taken:
        command = [sys.executable, __file__, "--read", server.dsn(), taken, f"{PUBLICATION}_{slot}", end]
        return dict(json.loads(subprocess.check_output([*command, form, str(log or "")])))


def open_stream(dsn: str, slot: str, publication: str, *, in_binary: bool = False) -> PostgresStream:
    """A stream over the slot, as `PostgresSource.open` makes it."""
    catalog = connect(SecretStr(dsn), name="benchmark", application="benchmark")
    replication = connect(SecretStr(dsn), name="benchmark", application="benchmark stream", replication=True)
    start = slots.start_position(catalog, slot, resume_after=START)
    wire = slots.start_replication(
        replication, source="benchmark", slot=slot, publication=publication, start=start, in_binary=in_binary
    )
    builder = SliceBuilder(relations=Relations(lambda relation: describe_relation(catalog, relation)), position=start)
    return PostgresStream(connection=replication, wire=wire, builder=builder, durable=start)


def read_to_end(
    dsn: str, slot: str, publication: str, end: Lsn, *, in_binary: bool, log: Path | None
) -> dict[str, float]:
    """Read up to `end`, build Arrow, and append to a log where one is given."""
    # As the capture service does.
    leave_pandas_out()
    compile_loops(in_binary=in_binary)
    writer = LocalLogWriter.open(log) if log else None
    before, began, changes = resource.getrusage(resource.RUSAGE_SELF), time.monotonic(), 0
    way: list[tuple[int, float]] = []
    with open_stream(dsn, slot, publication, in_binary=in_binary) as stream:
        while stream.builder.position < end:
            taken = stream.next(timeout_s=1)
            if taken is None:
                continue
            changes += sum(len(batch) for batch in taken.batches if batch.schema.name != MESSAGES)
            if writer is not None:
                append(writer, taken)
            stream.confirm(taken.position)
            way.append((changes, time.process_time()))
        wall_s = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    half_changes, half_cpu = next(((count, cpu) for count, cpu in way if 2 * count >= changes), (0, 0.0))
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "changes": changes,
        "rss_mb": after.ru_maxrss / 1024,
        "steady_changes": changes - half_changes,
        "steady_cpu_s": way[-1][1] - half_cpu if way else 0.0,
    }


def append(writer: LocalLogWriter, taken: Slice) -> None:
    end = writer.end()
    writer.append(
        Group(
            batches=taken.batches,
            position=max(taken.position, end.position),
            previous_position=end.position,
            transaction_count=taken.transaction_count,
            is_partial=taken.is_partial,
        )
    )


def commit_to_durable(server: PostgresServer, folder: Path, *, seconds: int) -> tuple[float, float]:
    """Milliseconds from commit to durable in the log at 1,000 one-row transactions a second: p50 and p99."""
    script = folder / "insert.sql"
    script.write_text("insert into small select nextval('numbers'), 1, 'value', now();\n", encoding="utf-8")
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create sequence if not exists numbers cache 100")
        connection.execute("select pg_create_logical_replication_slot('latency', 'pgoutput')")
    lags: list[float] = []
    with LocalLogWriter.open(folder / "latency") as writer, open_stream(server.dsn(), "latency", PUBLICATION) as stream:
        load = subprocess.Popen(
            [
                embedded_binaries() / "pgbench",
                "-n",
                "-f",
                script,
                "-c",
                "4",
                "-R",
                "1000",
                "-T",
                str(seconds),
                server.dsn(),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        began = time.monotonic()
        while load.poll() is None:
            taken = stream.next(timeout_s=0.25)
            if taken is None or not taken.batches:
                continue
            append(writer, taken)
            now_us = time.time_ns() // 1000
            stream.confirm(taken.position)
            if time.monotonic() - began > 2:
                committed = [batch.rows.column("_committed_at").cast("int64").to_numpy() for batch in taken.batches]
                lags += [(now_us - at) / 1000 for each in committed for at in each.tolist()]
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("select pg_drop_replication_slot('latency')")
    lags.sort()
    return lags[len(lags) // 2], lags[len(lags) * 99 // 100]


def large_transaction(server: PostgresServer, folder: Path, *, rows: int) -> dict[str, float]:
    """One transaction of so many rows, into the log."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"select pg_create_logical_replication_slot('{PUBLICATION}', 'pgoutput')")
        connection.execute(f"insert into large select g, 1, 'value ' || g, now() from generate_series(1, {rows}) g")
        connection.execute("select pg_logical_emit_message(true, 'end', '')")
    end = end_of_wal(server)
    command = [sys.executable, __file__, "--read", server.dsn(), PUBLICATION, PUBLICATION, end, "text"]
    command.append(str(folder / "large"))
    return dict(json.loads(subprocess.check_output(command)))


def compare(server: PostgresServer, slot: str, folder: Path, *, repeats: int) -> list[Figure]:
    """Drain one table's changes by the server's tool, by us, and by us into the log, in turn."""
    end = end_of_wal(server)
    theirs: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    logged: list[dict[str, float]] = []
    binary: list[dict[str, float]] = []
    for turn in range(repeats):
        theirs.append(drained_by_server_tool(server, slot, end))
        ours.append(drained_by_us(server, slot, end))
        logged.append(drained_by_us(server, slot, end, log=folder / f"{slot}-{turn}"))
        binary.append(drained_by_us(server, slot, end, form="binary"))
    pairs = list(zip(theirs, ours, logged, strict=True))

    def figure(name: str, values: list[float], unit: str, goal: float | None = None, **more: Any) -> Figure:
        return Figure(name=f"{slot}: {name}", values=values, unit=unit, goal=goal, **more)

    more: dict[str, Any] = {"smaller_is_better": False}
    return [
        figure("pg_recvlogical", [run["wall_s"] for run in theirs], "s"),
        figure("to Arrow", [run["wall_s"] for run in ours], "s"),
        figure("to Arrow ÷ limit", [limit["wall_s"] / own["wall_s"] for limit, own, _ in pairs], "", 0.9, **more),
        figure("to the log ÷ limit", [limit["wall_s"] / own["wall_s"] for limit, _, own in pairs], "", **more),
        figure("pg_recvlogical, CPU", [run["cpu_s"] for run in theirs], "s"),
        figure("to Arrow, CPU", [run["cpu_s"] for run in ours], "s"),
        figure("changes per CPU second", [run["changes"] / run["cpu_s"] for run in ours], "", **more),
        figure(
            "in binary ÷ limit",
            [limit["wall_s"] / own["wall_s"] for limit, own in zip(theirs, binary, strict=True)],
            "",
            **more,
        ),
        figure("changes per CPU second, in binary", [run["changes"] / run["cpu_s"] for run in binary], "", **more),
        figure("memory", [max(own["rss_mb"], log["rss_mb"]) for _, own, log in pairs], "MB", 300),
    ]


def beside_debezium(server: PostgresServer, slot: str, *, repeats: int) -> list[Figure]:
    """Processor time per change of Debezium's embedded engine and of ours, on the same WAL in turn, both warm.

    Raises:
        PeerMissingError: Debezium cannot be run here.
    """
    end = end_of_wal(server)
    theirs: list[float] = []
    ours: list[float] = []
    for _ in range(repeats):
        own = drained_by_us(server, slot, end)
        with copy_of(server, slot) as taken:
            publication, expected = f"{PUBLICATION}_{slot}", int(own["changes"])
            peer = debezium.drain(server, slot=taken, publication=publication, expected=expected)
        ours.append(own["steady_cpu_s"] / own["steady_changes"] * 1e6)
        theirs.append(peer["steady_cpu_s"] / peer["steady_changes"] * 1e6)
    ratios = [peer / own for peer, own in zip(theirs, ours, strict=True)]
    return [
        Figure(name=f"{slot}: Debezium, CPU per change", values=theirs, unit="µs"),
        Figure(name=f"{slot}: to Arrow, CPU per change", values=ours, unit="µs"),
        Figure(name=f"{slot}: Debezium ÷ ours", values=ratios, unit="", goal=10, smaller_is_better=False),
    ]


def main() -> int:
    """Make the changes, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="at least three")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--narrow", type=int, default=2_000_000, help="changes of 4 columns")
    parser.add_argument("--wide", type=int, default=600_000, help="changes of 20 columns")
    parser.add_argument("--large", type=int, default=5_000_000, help="rows of the large transaction; 0 leaves it out")
    parser.add_argument("--seconds", type=int, default=20, help="of 1,000 changes each; 0 leaves them out")
    parser.add_argument("--no-debezium", action="store_true", help="leave the peer out")
    parser.add_argument("--read", nargs=6, metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        dsn, slot, publication, end, form, log = options.read
        folder_of_log = Path(log) if log else None
        found = read_to_end(dsn, slot, publication, Lsn.parse(end), in_binary=form == "binary", log=folder_of_log)
        print(json.dumps(found))
        return 0
    not_measured = ""
    with tempfile.TemporaryDirectory(prefix="deltaworks-") as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        with PostgresServer.start(folder / "data", settings=SETTINGS) as server:
            make_changes(server, narrow=options.narrow, wide=options.wide)
            figures = [
                figure
                for slot in ("narrow", "wide")
                for figure in compare(server, slot, folder, repeats=options.repeats)
            ]
            if not options.no_debezium:
                try:
                    for slot in ("narrow", "wide"):
                        figures += beside_debezium(server, slot, repeats=options.repeats)
                except debezium.PeerMissingError as missing:
                    not_measured = f"NOT MEASURED beside Debezium: {missing}"
            if options.seconds:
                lags = [commit_to_durable(server, folder, seconds=options.seconds)]
                figures.append(
                    Figure(name="commit → durable, p50", values=[p50 for p50, _ in lags], unit="ms", goal=20)
                )
                figures.append(
                    Figure(name="commit → durable, p99", values=[p99 for _, p99 in lags], unit="ms", goal=100)
                )
            if options.large:
                run = large_transaction(server, folder, rows=options.large)
                figures.append(Figure(name="large transaction, memory", values=[run["rss_mb"]], unit="MB", goal=400))
                figures.append(Figure(name="large transaction", values=[run["wall_s"]], unit="s"))
    missed = report("Capture", figures, path=options.json)
    if not_measured:
        print(not_measured, file=sys.stderr)
    return missed + bool(not_measured)


if __name__ == "__main__":
    sys.exit(main())
