"""The way to the server breaks at the worst moments: nothing is lost and nothing comes twice."""

import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from capture.replaying import gaps, record, replay, table_of
from servers.postgres import Database

from deltaworks.capture.postgres.slot import SlotHeldError
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SourceNotReadyError
from deltaworks.config import PostgresConfig
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import follow
from deltaworks.testing.postgres import PostgresServer

DEADLINE_S = 60.0


class Proxy:
    """A TCP proxy before a server, which cuts every connection after some bytes from the server."""

    def __init__(self, port: int, *, seed: int) -> None:
        self.cuts = 0
        self.is_cutting = True
        self._target = port
        self._chance = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._run(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            _hang_up(each)
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            # Enough for the hello; then anywhere, also in the middle of a message.
            left = self._chance.randrange(8_000, 60_000) if self.is_cutting else None
            self._run(self._pump, client, server, None)
            self._run(self._pump, server, client, left)

    def _pump(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        try:
            while data := source.recv(4096 if left is None else min(4096, left)):
                target.sendall(data)
                if left is not None and (left := left - len(data)) <= 0:
                    self.cuts += 1
                    break
        except OSError:
            pass
        finally:
            _hang_up(source)
            _hang_up(target)

    def _run(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def following(source: PostgresSource, log: MemoryLog) -> Iterator[None]:
    """A service that records in the background."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, source, writer, log.reader(), stop=stop)
        try:
            yield
            assert not service.done(), service.exception()
        finally:
            stop.set()
            service.result(timeout=DEADLINE_S)


def wait_for(log: MemoryLog, database: Database) -> None:
    """Wait until the log has the table as it is."""
    reader, waited = log.reader(), 0.0
    while replay(log, "t") != table_of(database, "t"):
        assert waited < 2 * DEADLINE_S, "the log did not catch up"
        reader.wait(after_sequence=reader.end().sequence, timeout_s=0.2)
        waited += 0.2


def repeated(log: MemoryLog) -> list[tuple[int, int]]:
    """Streamed changes that are in the log more than once."""
    seen = Counter(
        (row["_commit"], row["_ordinal"])
        for group in log.reader().read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
        if row["_op"] != "r"
    )
    return [identity for identity, count in seen.items() if count > 1]


@pytest.mark.parametrize("seed", [3, 5])
def test_network_that_is_cut_in_mid_message_loses_and_repeats_nothing(database: Database, seed: int) -> None:
    log = MemoryLog()
    database.execute("create table t (id int primary key, v text)")
    with closing(Proxy(database.server.port, seed=seed)) as proxy:
        dsn = f"host=127.0.0.1 port={proxy.port} user=postgres dbname={database.name} sslmode=disable"
        config = PostgresConfig.model_validate(
            {"kind": "postgres", "dsn": dsn, "tables": ["t"], "slot": database.name, "lease_s": 3.0}
        )
        with closing(PostgresSource(database.name, config)) as source, following(source, log):
            for part in range(10):
                database.execute(
                    f"insert into t select {part} * 100 + g, repeat('x', 300) from generate_series(1, 100) g",
                    f"update t set v = 'moved on' where id % 7 = {part}",
                )
            while proxy.cuts < 3:
                database.execute("update t set v = repeat('y', 400) where id % 5 = 0")
            proxy.is_cutting = False
            wait_for(log, database)
    assert repeated(log) == []
    assert gaps(log) == []


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_server_that_restarts_in_mid_stream_loses_and_repeats_nothing(
    server_folder: Path, pytestconfig: pytest.Config, how: str
) -> None:
    log, binaries = MemoryLog(), pytestconfig.getoption("--postgres-binaries")
    folder = server_folder / f"restarting_{how}"
    server = PostgresServer.start(folder, binaries=binaries)
    try:
        database = Database(server, "postgres")
        database.execute("create table t (id int primary key, v text)")
        with closing(database.source("t")) as source, following(source, log):
            for part in range(3):
                database.execute(f"insert into t select {part} * 1000 + g, 'x' from generate_series(1, 1000) g")
                getattr(server, how)()
                server = PostgresServer.start(folder, port=server.port, binaries=binaries)
                database = Database(server, "postgres")
                database.execute(f"delete from t where id = {part} * 1000 + 5")
            wait_for(log, database)
    finally:
        server.stop()
    assert repeated(log) == []
    assert gaps(log) == []


def test_slot_that_somebody_else_reads_is_named_with_its_reader(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    with closing(database.source("t")) as source:
        record(MemoryLog(), source)
        other = psycopg.connect(
            database.dsn, autocommit=True, replication="database", application_name="somebody's tool"
        )
        with closing(other):
            slot = f"deltaworks_{database.name}"
            other.pgconn.exec_(
                f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names '{slot}')".encode()
            )
            with pytest.raises(SlotHeldError, match=rf"slot '{slot}': process \d+ .*somebody's tool.*; stop the other"):
                record(MemoryLog(), source)


def test_role_that_may_not_replicate_is_told_the_statement(database: Database) -> None:
    database.execute(
        "create table t (id int primary key)", "drop role if exists reader_only", "create role reader_only login"
    )
    database.execute("grant select on t to reader_only")
    dsn = database.server.dsn(database.name, user="reader_only")
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]})
    try:
        with (
            closing(PostgresSource(database.name, config)) as source,
            pytest.raises(SourceNotReadyError, match=r"alter role .*reader_only.* replication"),
        ):
            record(MemoryLog(), source)
    finally:
        database.execute("drop owned by reader_only", "drop role reader_only")
