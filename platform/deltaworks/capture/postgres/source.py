"""PostgreSQL 14 and newer as a source: publication, slot and pgoutput; dumps by key range."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from psycopg import errors
from pydantic import SecretStr

from deltaworks.capture.continuity import SlotHealth
from deltaworks.capture.postgres import advice, preflight, reading
from deltaworks.capture.postgres import slot as slots
from deltaworks.capture.postgres import standby as standbys
from deltaworks.capture.postgres.binary_cells import is_streamed_in_binary
from deltaworks.capture.postgres.catalog import (
    AnyConnection,
    Descriptions,
    describe_relation,
    describe_tables,
    find_published,
    find_tables,
    query,
)
from deltaworks.capture.postgres.columnar import MARK_PREFIX, SliceBuilder
from deltaworks.capture.postgres.connect import connect, translated
from deltaworks.capture.postgres.lease import PostgresLease
from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.postgres.replication import PostgresStream
from deltaworks.capture.postgres.role import role_sql
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.postgres.spill import clean_spills
from deltaworks.capture.postgres.status import read_status
from deltaworks.capture.postgres.still import PostgresSnapshot, take_snapshot
from deltaworks.capture.postgres.survey import take_survey
from deltaworks.capture.schema_change import Survey
from deltaworks.capture.source import (
    Chunk,
    DumpBlockedError,
    Finding,
    Running,
    SourceNotReadyError,
    SourceUnreachableError,
    StreamFormatError,
)
from deltaworks.capture.status import SourceStatus
from deltaworks.config import PostgresConfig
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName, TableSchema

INTERRUPT_PATIENCE_S = 5.0
"""How long to wait until the server has taken note that a read is to end."""


class PostgresSource:
    """A `Source` over one PostgreSQL database. Not thread-safe.

    It holds one ordinary connection for questions and marks, and one that dumps read over (and one to the
    standby where they do), each opened when first needed and again after it broke. Each open stream has
    a replication connection of its own.

    In `folder` a stream keeps transactions that are too large for memory, and the bytes of a message that nobody
    can read; without one the former goes to the system's folder for temporary files, the latter nowhere.
    """

    def __init__(self, name: str, config: PostgresConfig, *, folder: Path | None = None) -> None:
        self.name = name
        self._folder = folder
        self.chunk_rows = config.chunk_rows
        self.chunk_s = config.dump_chunk_s
        self.repairs_gaps = config.on_gap == "repair"
        self.slot_alarm_bytes = config.slot_alarm_bytes
        self._lease_s = config.lease_s
        self._asked_lease: PostgresLease | None = None
        self._dsn = config.dsn
        self._wanted = preflight.Wanted(
            source=name,
            tables=config.table_names,
            patterns=config.table_patterns,
            publication=config.publication or f"deltaworks_{name}",
            slot=config.slot or f"deltaworks_{name}",
        )
        self._may_be_binary = config.stream_format == "binary"
        self._is_binary = False
        self._descriptions = Descriptions(self._wanted.publication)
        self._connection: AnyConnection | None = None
        self._readings: AnyConnection | None = None
        self._dump_dsn = config.dump_dsn
        self._standby: AnyConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> Sequence[Finding]:
        """Everything missing on the server, all at once, then what is worth a warning; no errors when it is ready."""
        with self._asking("look at the server") as connection:
            wanted = preflight.resolve(connection, self._wanted)
            state = preflight.inspect(connection, wanted)
            found = preflight.findings(state, wanted, connection)
            advised = advice.warnings(state, wanted, connection)
        if not found:
            # Only a try shows what a rule of pg_hba.conf or a pooler on the way makes of it.
            found = advice.refused_stream(self._dsn, name=self.name)
        return [*found, *advised]

    def least_role(self) -> str:
        """SQL for the role of the connection string, for its owner to run; asks no server."""
        return role_sql(self._dsn, self._wanted)

    def prepare(self, *, with_slot: bool = True) -> None:
        """Create the publication and, with `with_slot`, the slot where they are missing; see `Source`.

        Creating a slot waits for the transactions that write at that moment.
        """
        with self._asking("prepare the server") as connection:
            wanted = preflight.resolve(connection, self._wanted)
            state = preflight.inspect(connection, wanted)
            found = preflight.findings(state, wanted, connection)
            if found:
                raise SourceNotReadyError(_listing(self.name, found))
            # The publication comes first: the log before it cannot be read with it.
            if state.publication is None:
                connection.execute(preflight.create_publication(wanted, version=connection.info.server_version))
            elif missing := preflight.unpublished(state, wanted):
                connection.execute(preflight.extend_publication(wanted, missing))
            if with_slot and state.slot is None:
                slots.create_slot(connection, wanted.slot, tables=wanted.tables, source=self.name)

    def status(self, *, timeout_s: float) -> SourceStatus:
        """Where the server's log is, and the slot; over a connection of its own."""
        return read_status(self._dsn, self._wanted, timeout_s=timeout_s)

    def tables(self) -> Sequence[TableSchema]:
        """The captured tables as they are now, in configured order."""
        with self._asking("describe the tables") as connection:
            wanted = preflight.resolve(connection, self._wanted)
            facts = find_tables(connection, wanted.tables)
            missing = [str(name) for name in wanted.tables if name not in facts]
            if missing:
                raise SourceNotReadyError(f"cannot describe tables of source {self.name!r}: no {', '.join(missing)}")
            schemas = describe_tables(connection, facts.values(), find_published(connection, wanted.publication))
        return [schemas[name] for name in wanted.tables]

    def survey(self) -> Survey:
        """What the catalog says of the source and its captured tables now."""
        with self._asking("survey the tables") as connection:
            wanted = preflight.resolve(connection, self._wanted)
            return take_survey(connection, tables=wanted.tables, publication=wanted.publication)

    def open(self, *, resume_after: Lsn, known: Survey | None = None) -> AbstractContextManager[PostgresStream]:
        """Start streaming what was committed after `resume_after`; from the slot's own position for `START`.

        Raises:
            SlotInvalidatedError: the slot is gone, lost, or ahead of `resume_after`; or the server's history or
                its publication is not the one that was `known` there.
            AnotherDatabaseError: it is another database cluster.
            SlotHeldError: another reader is on the slot.
        """
        self._is_binary = self._may_be_binary and all(is_streamed_in_binary(table.columns) for table in self.tables())
        replication = connect(self._dsn, name=self.name, application=f"deltaworks {self.name} stream", replication=True)
        try:
            if known is not None:
                now = self.survey()
                with translated(f"read the history of source {self.name!r}"):
                    slots.check_history(replication, known, now, resume_after=resume_after, source=self.name)
            with self._asking("read the slot") as connection:
                start = slots.start_position(connection, self._wanted.slot, resume_after=resume_after)
                slots.keep_on_standbys(
                    replication, query(connection, "slot", slot=self._wanted.slot)[0], self._wanted.slot
                )
                following = Snapshot.parse(query(connection, "running")[0]["snapshot"]).first_unknown
            wire = slots.start_replication(
                replication,
                source=self.name,
                slot=self._wanted.slot,
                publication=self._wanted.publication,
                start=start,
                in_binary=self._is_binary,
            )
            if self._folder is not None:
                # Whoever has the slot is the only one here.
                clean_spills(self._folder)
        except BaseException:
            replication.close()
            raise
        builder = SliceBuilder(
            relations=Relations(self._describe),
            position=start,
            nearby_xid=following,
            reports=self._folder,
            spill_folder=self._folder,
        )
        return PostgresStream(connection=replication, wire=wire, builder=builder, durable=start)

    def renew(self, *, after: Lsn) -> Lsn:
        """Replace the slot by a new one that starts after `after`; its position. What lies between is a gap.

        Raises:
            SlotHeldError: another reader is on the slot.
            TerminalError: the server's log ends too far before `after`.
        """
        with self._asking("make a new slot") as connection:
            wanted = preflight.resolve(connection, self._wanted)
            return slots.renew_slot(connection, wanted.slot, after=after, tables=wanted.tables, source=self.name)

    def health(self) -> SlotHealth | None:
        """How the slot is; `None` when there is none."""
        with self._asking("look at the slot") as connection:
            return slots.health(connection, self._wanted.slot)

    def lease(self) -> PostgresLease:
        """Take the right to be the one reader, over all machines, on a connection of its own.

        Raises:
            LeaseHeldError: another reader has it and is alive.
        """
        lease = self._asked_lease or PostgresLease(
            self._dsn, name=self.name, slot=self._wanted.slot, lease_s=self._lease_s
        )
        # A standby asks again and again, over one connection.
        self._asked_lease = lease
        lease.take()
        self._asked_lease = None
        return lease

    def current_position(self) -> Lsn:
        """A position at or after every change visible now."""
        with self._asking("ask for the position") as connection:
            # The insert position: with synchronous_commit off a change is visible before it is flushed.
            row = connection.execute("select pg_catalog.pg_current_wal_insert_lsn()::text").fetchone()
        return Lsn.parse(row[0]) if row else START

    def last_key(self, table: TableName) -> tuple[str, ...] | None:
        """The largest key now, as text in key order; `None` for an empty table."""
        with self._reading(f"find the last key of {table}") as connection:
            return reading.last_key(connection, self._describe_now(table, connection))

    def chunk(
        self,
        table: TableName,
        *,
        after_key: tuple[str, ...] | None,
        up_to_key: tuple[str, ...],
        limit: int,
        where: str | None = None,
    ) -> Chunk:
        """Up to `limit` rows with `after_key < key <= up_to_key`; the database compares the keys."""
        within = reading.Range(after_key=after_key, up_to_key=up_to_key, limit=limit, where=where)
        with self._dump(f"read {table}") as (connection, see):
            return reading.read_range(connection, table, describe=self._describe_now, see=see, within=within)

    def rows(self, table: TableName, *, keys: Sequence[tuple[str, ...]]) -> Chunk:
        """The rows that have one of these keys now, and the keys that have none."""
        with self._dump(f"read {table}") as (connection, see):
            return reading.read_keys(connection, table, describe=self._describe_now, see=see, keys=keys)

    def interrupt(self) -> None:
        """End a read that another thread is at, with an error there."""
        for connection in (self._readings, self._standby):
            if connection is not None and not connection.closed:
                connection.cancel_safe(timeout=INTERRUPT_PATIENCE_S)

    def running(self) -> Running:
        """The transactions that run now, and since when."""
        with self._asking("ask for running transactions") as connection:
            row = query(connection, "running")[0]
        # Another role's start times are hidden without pg_monitor; then any time is possible.
        began_at = datetime.min.replace(tzinfo=UTC) if row["hidden"] else row["oldest_began_at"]
        return Running(visible_in=Snapshot.parse(row["snapshot"]), next_txid=row["next_txid"], oldest_began_at=began_at)

    def estimated_rows(self, table: TableName) -> int | None:
        """The statistics' row count; counted where there are none and the table is small."""
        with self._reading(f"estimate the rows of {table}") as connection:
            return reading.estimated_rows(connection, table)

    def mark(self, mark_id: str) -> None:
        """Commit a marker into the WAL; it comes back as `Slice.mark`."""
        with self._asking("write a mark") as connection:
            connection.execute("select pg_catalog.pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, mark_id])

    def snapshot(self) -> AbstractContextManager[PostgresSnapshot]:
        """All captured tables as of one exact position of the WAL, over connections of its own."""
        wanted = self._wanted
        if wanted.patterns:
            with self._asking("find the tables") as connection:
                wanted = preflight.resolve(connection, wanted)
        return take_snapshot(self._dsn, name=self.name, tables=wanted.tables, publication=wanted.publication)

    def has_uncaptured(self) -> bool:
        """Whether the slot has changes of our tables to give; asking takes none of them."""
        with self._asking("look into the slot") as connection:
            slot = next(iter(query(connection, "slot", slot=self._wanted.slot)), None)
            if slot is None:
                return True
            try:
                found = query(connection, "uncaptured", slot=self._wanted.slot, publication=self._wanted.publication)
            except errors.ObjectInUse:
                return False
        return bool(found)

    def close(self) -> None:
        """Let go of the connections; the next call opens a new one."""
        for connection in (self._connection, self._readings, self._standby):
            if connection is not None:
                connection.close()
        self._connection = self._readings = self._standby = None
        if self._asked_lease is not None:
            self._asked_lease.close()
            self._asked_lease = None

    @contextmanager
    def _asking(self, what: str) -> Iterator[AnyConnection]:
        """The ordinary connection, opened when there is none; errors in the contract's words."""
        if self._connection is None or self._connection.closed or self._connection.broken:
            self._connection = connect(self._dsn, name=self.name, application=f"deltaworks {self.name}")
        with translated(f"{what} of source {self.name!r}"):
            yield self._connection

    @contextmanager
    def _reading(self, what: str) -> Iterator[AnyConnection]:
        """The connection that dumps read over; theirs alone, so that they may work in another thread."""
        if self._readings is None or self._readings.closed or self._readings.broken:
            self._readings = connect(self._dsn, name=self.name, application=f"deltaworks {self.name} dump")
        with translated(f"{what} of source {self.name!r}"):
            yield self._readings

    @contextmanager
    def _dump(self, what: str) -> Iterator[tuple[AnyConnection, reading.See]]:
        """The connection to read rows over, and how to tell what its snapshot sees."""
        with self._reading(what) as primary:
            if self._dump_dsn is None:
                yield primary, reading.see_primary
                return
            try:
                standby = self._standby_of(primary, self._dump_dsn)
                with translated(f"{what} of the standby of source {self.name!r}"):
                    replayed = standbys.wait_for_replay(standby, primary, source=self.name)
                    yield standby, lambda connection: standbys.see_standby(connection, replayed=replayed)
            except SourceUnreachableError as error:
                # The stream does not need the standby; replay may also have ended a read that was in its way.
                raise DumpBlockedError(str(error)) from error

    def _standby_of(self, primary: AnyConnection, dsn: SecretStr) -> AnyConnection:
        if self._standby is None or self._standby.closed or self._standby.broken:
            self._standby = connect(dsn, name=self.name, application=f"deltaworks {self.name} dump")
        # Asked every time: a standby can become a primary while it is connected to.
        standbys.check_is_standby(self._standby, primary, source=self.name)
        return self._standby

    def _describe(self, relation: Relation) -> TableSchema | None:
        name = TableName(relation.namespace, relation.name)
        if name not in self._wanted.tables and not any(pattern.holds(name) for pattern in self._wanted.patterns):
            return None
        with self._asking(f"describe {name}") as connection:
            if name not in self._wanted.tables:
                # One that has another name by now had this one when it was written to.
                is_there = bool(find_tables(connection, [name]))
                if is_there and name not in preflight.resolve(connection, self._wanted).tables:
                    return None
            schema = describe_relation(connection, relation)
        if relation.identity == "n":
            raise SourceNotReadyError(
                f"cannot capture {name} any further: with replica identity nothing its updates do not say which row; "
                "set it back to default, or to full"
            )
        if self._is_binary and not is_streamed_in_binary(schema.columns):
            # A table may have had such a column at this place of the log and have it no more.
            self._may_be_binary = False
            raise StreamFormatError(f"cannot read {name} of source {self.name!r} in binary; its stream is read as text")
        return schema

    def _describe_now(self, table: TableName, connection: AnyConnection) -> TableSchema:
        schema = self._descriptions.describe(table, connection)
        if schema is None:
            raise SourceNotReadyError(f"cannot find table {table} of source {self.name!r}; was it dropped or renamed?")
        return schema


def _listing(source: str, found: Sequence[Finding]) -> str:
    lines = "\n".join(f"  - {finding.what}\n    {finding.mend}" for finding in found)
    return f"cannot capture source {source!r}, {len(found)} to mend on the server:\n{lines}"
