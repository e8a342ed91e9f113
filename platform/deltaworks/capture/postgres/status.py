"""Asks a PostgreSQL server how it is, over a connection of its own that gives up soon."""

from pydantic import SecretStr

from deltaworks.capture.postgres.catalog import CatalogRow, query
from deltaworks.capture.postgres.connect import connect, translated
from deltaworks.capture.postgres.preflight import Wanted, resolve
from deltaworks.capture.status import SlotStatus, SourceStatus
from deltaworks.position import Lsn
from deltaworks.schema import TableName


def read_status(dsn: SecretStr, wanted: Wanted, *, timeout_s: float) -> SourceStatus:
    """The server's position, its clock and the slot; the answer comes within about `timeout_s`, or an error.

    Raises:
        SourceUnreachableError: no answer in time.
        SourceNotReadyError: the server refuses the login.
    """
    connection = connect(dsn, name=wanted.source, application=f"deltaworks {wanted.source} status", timeout_s=timeout_s)
    with connection, translated(f"ask how source {wanted.source!r} is"):
        connection.execute(f"set statement_timeout = {int(timeout_s * 1000)}")
        row = query(connection, "status", slot=wanted.slot)[0]
        wanted = resolve(connection, wanted)
        counts = query(
            connection,
            "row_counts",
            namespaces=[name.namespace for name in wanted.tables],
            names=[name.name for name in wanted.tables],
        )
    return SourceStatus(
        position=Lsn.parse(row["position"]),
        at=row["at"],
        slot=_slot(row, wanted.slot) if row["is_active"] is not None else None,
        row_counts={TableName(each["namespace"], each["name"]): each["estimated"] for each in counts},
    )


def _slot(row: CatalogRow, name: str) -> SlotStatus:
    return SlotStatus(
        name=name,
        is_active=row["is_active"],
        wal_status=row["wal_status"],
        kept_bytes=row["kept_bytes"],
        safe_bytes=row["safe_bytes"],
        unconfirmed_bytes=row["unconfirmed_bytes"],
        invalidation=row["invalidation"],
        inactive_since=row["inactive_since"],
    )
