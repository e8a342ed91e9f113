"""The replication slot: the server's bookmark that holds WAL back until capture confirmed it.

A slot can be lost: dropped, invalidated because it held back too much, left behind on a failed server,
moved by somebody else. Every one of these is found before the first change is read, as a
`SlotInvalidatedError` that names what is missing; `renew_slot` is the start of its repair.
"""

import time
from collections.abc import Sequence

import psycopg
import structlog
from psycopg import errors, sql

from deltaworks import faults
from deltaworks.capture.continuity import SlotHealth
from deltaworks.capture.postgres import wire
from deltaworks.capture.postgres.catalog import AnyConnection, CatalogRow, find_tables, query
from deltaworks.capture.postgres.connect import translated
from deltaworks.capture.postgres.wire import Wire
from deltaworks.capture.schema_change import Survey
from deltaworks.capture.source import SlotInvalidatedError
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName

HELD_PATIENCE_S = 2.0
"""The server notices only after a moment that the last reader of a slot has left."""

MAKINGS = 5
"""How often a slot is made until no table changes meanwhile."""

FAILOVER_VERSION = 170000
"""From 17 on a standby can keep a copy of a slot, so that it outlives its server."""

PAD_BYTES = 1 << 20
PAD_LIMIT_BYTES = 256 << 20
"""How far a new server's log is brought on to pass a position of the old one. A crash loses far less."""

logger = structlog.get_logger()


class SlotHeldError(RetryableError):
    """Another reader is on the slot; there can be one."""


class SlotNotMadeError(RetryableError):
    """Tables were altered whenever the slot was made."""


class AnotherDatabaseError(TerminalError):
    """The connection string leads to another database cluster than the one that was captured."""


def create_slot(connection: AnyConnection, name: str, *, tables: Sequence[TableName], source: str) -> None:
    """Make the slot; waits for the transactions that write at that moment.

    From version 17 on it is a failover slot: a standby that synchronizes slots keeps a copy.

    While it waits the server takes no note of what is committed (seen with 15 and 18). A transaction that begins
    after a table was altered in that time and ends when the slot is there would be sent as rows of the old table,
    without a word, and after a truncate it would stop the stream for good. So a slot during whose making one of
    the `tables` changed is made anew.

    Raises:
        SlotNotMadeError: the columns of a table changed each of `MAKINGS` times.
    """
    oids = [facts.oid for facts in find_tables(connection, tables).values()]
    for makings_left in reversed(range(MAKINGS)):
        before = query(connection, "versions", oids=oids)
        _create_slot(connection, name, source=source)
        after = query(connection, "versions", oids=oids)
        changed = _changed(before, after, "version")
        if not changed:
            return
        altered = _changed(before, after, "columns")
        if not makings_left and not altered:
            # What a truncate leads to is loud, and is repaired when it happens: see `UndecodableError`.
            return
        logger.warning("tables changed while the slot was made; it is made anew", source=source, tables=changed)
        connection.execute("select pg_catalog.pg_drop_replication_slot(%s)", [name])
    raise SlotNotMadeError(
        f"cannot make slot {name!r}: each of {MAKINGS} times {', '.join(altered)} was altered meanwhile, and the server"
        " would send rows by the old columns; it is tried again, and needs a moment without ALTER TABLE"
    )


def _create_slot(connection: AnyConnection, name: str, *, source: str) -> None:
    logger.info("creating the replication slot", source=source, slot=name)
    failover = ", failover => true" if connection.info.server_version >= FAILOVER_VERSION else ""
    statement = f"select pg_catalog.pg_create_logical_replication_slot(%s, 'pgoutput'{failover})"
    connection.execute(statement.encode(), [name])
    faults.reach("slot.after_create")


def _changed(before: Sequence[CatalogRow], after: Sequence[CatalogRow], what: str) -> list[str]:
    known = {row["table"]: row[what] for row in before}
    return [row["table"] for row in after if row[what] != known.get(row["table"])]


def renew_slot(connection: AnyConnection, name: str, *, after: Lsn, tables: Sequence[TableName], source: str) -> Lsn:
    """Replace the slot by a new one that starts after `after`, and give its position.

    What was committed between the two is in no stream. Positions only grow in a log, so a server that lost the
    end of its own log writes padding until it is past `after`.

    Raises:
        SlotHeldError: another reader is on the slot.
        TerminalError: the server's log is too far behind `after`.
    """
    slot = free_slot(connection, name)
    if slot is not None:
        logger.warning("dropping the replication slot", source=source, slot=name)
        connection.execute("select pg_catalog.pg_drop_replication_slot(%s)", [name])
    _pass_position(connection, after)
    create_slot(connection, name, tables=tables, source=source)
    made = query(connection, "slot", slot=name)[0]
    return Lsn.parse(made["confirmed"])


def start_position(connection: AnyConnection, name: str, *, resume_after: Lsn) -> Lsn:
    """Where a stream after `resume_after` starts; the slot's own position for `START`.

    Raises:
        SlotInvalidatedError: the slot is gone, lost, or ahead of `resume_after`.
        SlotHeldError: another reader is on the slot.
    """
    slot = free_slot(connection, name)
    mend = "the changes in between are lost to this log, a new slot and a dump of the tables mend it"
    if slot is None or slot["confirmed"] is None:
        raise SlotInvalidatedError(f"cannot resume after {resume_after}: slot {name!r} is gone; {mend}")
    if slot["wal_status"] == "lost" or slot["invalidation"] is not None:
        raise SlotInvalidatedError(
            f"cannot resume after {resume_after}: the server recycled log that slot {name!r} had not read"
            f" ({slot['invalidation'] or 'wal_removed'}); {mend}"
        )
    confirmed = Lsn.parse(slot["confirmed"])
    if resume_after == START:
        return confirmed
    # The server would start at its own position without a word.
    if confirmed > resume_after:
        raise SlotInvalidatedError(f"cannot resume after {resume_after}: slot {name!r} is ahead at {confirmed}; {mend}")
    if resume_after > Lsn.parse(slot["flushed"]):
        raise SlotInvalidatedError(
            f"cannot resume after {resume_after}: the server's own log ends before, at {slot['flushed']}, "
            f"so it was restored or replaced; {mend}"
        )
    return resume_after


def check_history(
    connection: psycopg.Connection[tuple[object, ...]], known: Survey, now: Survey, *, resume_after: Lsn, source: str
) -> None:
    """Check that the server's history holds what was captured; `connection` is a replication connection.

    Raises:
        AnotherDatabaseError: it is another database cluster.
        SlotInvalidatedError: it took another way before `resume_after`, or its publication is a new one.
    """
    if known.system != now.system:
        raise AnotherDatabaseError(
            f"cannot resume source {source!r}: its log was captured from database cluster {known.system!r} and"
            f" sources.{source}.dsn leads to {now.system!r}; mend the dsn, or capture the new one under another name"
        )
    if known.timeline != now.timeline:
        forked_at = _forked_at(connection, known.timeline, now.timeline)
        if forked_at is None or resume_after > forked_at:
            raise SlotInvalidatedError(
                f"cannot resume after {resume_after}: the server is on timeline {now.timeline}, which left timeline"
                f" {known.timeline} at {forked_at or 'no known place'}, so it lacks what was captured after that; a new"
                " slot and a dump of the tables mend it"
            )
        logger.warning(
            "the server failed over; nothing is missing",
            source=source,
            timeline=now.timeline,
            forked_at=str(forked_at),
        )
    is_new = known.publication and now.publication and _oid(known.publication) != _oid(now.publication)
    if is_new:
        # Before 18 the server cannot read log from before a publication was made; from then on it leaves it out.
        raise SlotInvalidatedError(
            f"cannot resume after {resume_after}: the publication was dropped and made anew, what was committed in"
            " between is not sent; a new slot and a dump of the tables mend it"
        )


def start_replication(
    connection: psycopg.Connection[tuple[object, ...]],
    *,
    source: str,
    slot: str,
    publication: str,
    start: Lsn,
    in_binary: bool = False,
) -> Wire:
    """Stream over a replication connection what was committed after `start`; values as text, or `in_binary`.

    Raises:
        SlotHeldError: another reader is on the slot.
        SlotInvalidatedError: the slot cannot be read any more.
    """
    published = sql.Identifier(publication).as_string(connection)
    command = sql.SQL(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '2', streaming 'on', "
        "publication_names {}, messages 'true'{})"
    ).format(
        sql.Identifier(slot),
        sql.SQL(str(start)),
        sql.Literal(published),
        sql.SQL(", binary 'true'" if in_binary else ""),
    )
    try:
        return wire.start(connection, command.as_bytes(connection))
    except errors.ObjectInUse as error:
        # The server names the process that is on it.
        raise SlotHeldError(f"cannot read slot {slot!r}: {error.diag.message_primary}") from error
    except errors.ObjectNotInPrerequisiteState as error:
        raise SlotInvalidatedError(
            f"cannot read slot {slot!r}: {error.diag.message_primary}; a new slot and a dump of the tables mend it"
        ) from error
    except psycopg.Error as error:
        with translated(f"start replication of source {source!r}"):
            raise error


def keep_on_standbys(connection: psycopg.Connection[tuple[object, ...]], slot: CatalogRow, name: str) -> None:
    """Make an older slot a failover slot where the server can; `connection` is a replication connection."""
    if connection.info.server_version < FAILOVER_VERSION or slot["is_failover"]:
        return
    command = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(name))
    connection.execute(command)
    logger.info("standbys may keep the slot from now on", slot=name)


def health(connection: AnyConnection, name: str) -> SlotHealth | None:
    """How the slot is; `None` when there is none."""
    slot = next(iter(query(connection, "slot", slot=name)), None)
    if slot is None:
        return None
    return SlotHealth(
        confirmed=None if slot["confirmed"] is None else Lsn.parse(slot["confirmed"]),
        current=Lsn.parse(slot["flushed"]),
        kept_bytes=slot["kept_bytes"] or 0,
        safe_bytes=slot["safe_bytes"],
        state=slot["invalidation"] or slot["wal_status"] or "unknown",
        is_lost=slot["wal_status"] == "lost" or slot["invalidation"] is not None,
        is_failover=slot["is_failover"],
    )


def free_slot(connection: AnyConnection, name: str) -> CatalogRow | None:
    """The slot, once nobody reads it.

    Raises:
        SlotHeldError: somebody still reads it after `HELD_PATIENCE_S`.
    """
    deadline = time.monotonic() + HELD_PATIENCE_S
    while True:
        slot = next(iter(query(connection, "slot", slot=name)), None)
        if slot is None or slot["active_pid"] is None:
            return slot
        if time.monotonic() > deadline:
            raise SlotHeldError(
                f"cannot read slot {name!r}: process {slot['active_pid']} of the server is on it "
                f"({slot['reader'] or 'unnamed'}); stop the other reader of this source"
            )
        time.sleep(0.05)


def _pass_position(connection: AnyConnection, position: Lsn) -> None:
    for _ in range(2 * PAD_LIMIT_BYTES // PAD_BYTES):
        row = connection.execute("select pg_catalog.pg_current_wal_insert_lsn()::text").fetchone()
        now = Lsn.parse(row[0]) if row else START
        if now > position:
            return
        if position.value - now.value > PAD_LIMIT_BYTES:
            break
        # Not transactional: it is in the WAL at once, and decoding passes over it.
        connection.execute(
            "select pg_catalog.pg_logical_emit_message(false, 'deltaworks.padding', repeat(' ', %s))",
            [min(PAD_BYTES, max(1, position.value - now.value))],
        )
    raise TerminalError(
        f"cannot go on after {position}: the server's own log ends at {now}, more than"
        f" {PAD_LIMIT_BYTES >> 20} MiB before; it was restored from an older copy: capture it under another name"
    )


def _oid(publication: str) -> str:
    return publication.partition(":")[0]


def _forked_at(connection: psycopg.Connection[tuple[object, ...]], known: int, now: int) -> Lsn | None:
    """Where the present timeline left a known one; `None` when it does not come from it."""
    if now < known:
        return None
    row = connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(now))).fetchone()
    content = row[1] if row else b""
    text = content.decode() if isinstance(content, bytes) else str(content)
    for line in text.splitlines():
        # Each line: the timeline that was left, the position, the reason.
        words = line.split()
        if len(words) >= 2 and words[0] == str(known):
            return Lsn.parse(words[1])
    return None
