"""The replication slot: the server's bookmark that holds WAL back until capture confirmed it."""

import time

import psycopg
import structlog
from psycopg import errors, pq, sql

from deltaworks.capture.postgres.catalog import AnyConnection, CatalogRow, query
from deltaworks.capture.postgres.connect import translated
from deltaworks.capture.source import SlotInvalidatedError
from deltaworks.errors import RetryableError
from deltaworks.position import START, Lsn

HELD_PATIENCE_S = 2.0
"""The server notices only after a moment that the last reader of a slot has left."""

logger = structlog.get_logger()


class SlotHeldError(RetryableError):
    """Another reader is on the slot; there can be one."""


def create_slot(connection: AnyConnection, name: str, *, source: str) -> None:
    """Make the slot; waits for the transactions that write at that moment."""
    logger.info("creating the replication slot", source=source, slot=name)
    connection.execute("select pg_catalog.pg_create_logical_replication_slot(%s, 'pgoutput')", [name])


def start_position(connection: AnyConnection, name: str, *, resume_after: Lsn) -> Lsn:
    """Where a stream after `resume_after` starts; the slot's own position for `START`.

    Raises:
        SlotInvalidatedError: the slot is gone, lost, or ahead of `resume_after`.
        SlotHeldError: another reader is on the slot.
    """
    slot = _free_slot(connection, name)
    mend = "the changes in between are lost to this log: capture the source into a new log, which dumps its tables"
    if slot is None or slot["confirmed"] is None:
        raise SlotInvalidatedError(f"cannot resume after {resume_after}: slot {name!r} is gone; {mend}")
    if slot["wal_status"] == "lost":
        raise SlotInvalidatedError(
            f"cannot resume after {resume_after}: the server recycled log that slot {name!r} had not read; "
            f"drop the slot; {mend}"
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


def start_replication(
    connection: psycopg.Connection[tuple[object, ...]], *, source: str, slot: str, publication: str, start: Lsn
) -> None:
    """Put a replication connection into COPY mode, streaming what was committed after `start`.

    Raises:
        SlotHeldError: another reader is on the slot.
        SlotInvalidatedError: the slot cannot be read any more.
    """
    published = sql.Identifier(publication).as_string(connection)
    command = sql.SQL(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {}, messages 'true')"
    ).format(sql.Identifier(slot), sql.SQL(str(start)), sql.Literal(published))
    result = connection.pgconn.exec_(command.as_bytes(connection))
    if result.status == pq.ExecStatus.COPY_BOTH:
        connection.pgconn.nonblocking = 1
        return
    error = errors.error_from_result(result)
    if isinstance(error, errors.ObjectInUse):
        # The server names the process that is on it.
        raise SlotHeldError(f"cannot read slot {slot!r}: {error.diag.message_primary}") from error
    if isinstance(error, errors.ObjectNotInPrerequisiteState):
        raise SlotInvalidatedError(
            f"cannot read slot {slot!r}: {error.diag.message_primary}; drop it and capture the "
            "source into a new log, which dumps its tables"
        ) from error
    with translated(f"start replication of source {source!r}"):
        raise error


def _free_slot(connection: AnyConnection, name: str) -> CatalogRow | None:
    """The slot, once nobody reads it."""
    deadline = time.monotonic() + HELD_PATIENCE_S
    while True:
        slot = next(iter(query(connection, "slot", slot=name)), None)
        if slot is None or slot["active_pid"] is None:
            return slot
        if time.monotonic() > deadline:
            raise SlotHeldError(
                f"cannot read slot {name!r}: process {slot['active_pid']} of the server is on it; "
                "stop the other reader of this source"
            )
        time.sleep(0.05)
