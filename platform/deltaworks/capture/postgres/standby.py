"""Reading dumps from a physical standby, so that they cost the primary nothing but their marks.

On a standby a transaction is visible once its commit record was replayed: there visibility follows the order of
the WAL. What is known of a snapshot S, with R the replayed position asked for *before* S was taken:

| transaction                              | S sees it                                              |
|------------------------------------------|--------------------------------------------------------|
| committed at or before R                 | yes: its record was replayed before S                  |
| older than every one that S holds running | yes: it had ended                                      |
| not older than the first S does not know | no                                                     |
| any other                                | not known: it was committed behind R, replay went on   |

`pg_current_snapshot()` does not list the running transactions of a standby, it gives the two bounds only
(they are kept where it does not look, `snapshot->subxip`), so the last line stays; `capture.dump` settles such rows.

A chunk is read once the standby has replayed all that the primary had flushed before: nothing that was
streamed is missing in it for long, and what had ended before a dump's fence is there.
"""

import time
from dataclasses import dataclass

from deltaworks.capture.postgres.catalog import AnyConnection
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.source import DumpBlockedError
from deltaworks.position import Lsn

PATIENCE_S = 2.0
"""How long a read waits for the standby; then the dump rests, and asks again."""

_LOOK_EVERY_S = 0.005


class StandbyUnfitError(DumpBlockedError):
    """What `dump_dsn` names cannot be read for a dump now: no standby of the source, or one that is behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbySnapshot:
    """What a snapshot on a standby sees; a `Visibility`.

    >>> seen = StandbySnapshot(replayed=100, oldest_running=7, first_unknown=9)
    >>> [seen.sees(7, commit=100), seen.sees(6, commit=101), seen.sees(9, commit=101), seen.sees(8, commit=101)]
    [True, True, False, None]
    """

    replayed: int
    oldest_running: int
    first_unknown: int

    def sees(self, txid: int, *, commit: int) -> bool | None:
        """Whether the effects of this committed transaction are visible; `None` when that cannot be known."""
        if commit <= self.replayed or txid < self.oldest_running:
            return True
        return False if txid >= self.first_unknown else None


def check_is_standby(standby: AnyConnection, primary: AnyConnection, *, source: str) -> None:
    """Check that one server is a standby of the other.

    Raises:
        StandbyUnfitError: it is not, or no longer.
    """
    if not _value(standby, "select pg_catalog.pg_is_in_recovery()"):
        raise StandbyUnfitError(
            f"cannot read dumps of source {source!r} from sources.{source}.dump_dsn: it is no standby; name one, or "
            "leave the setting out"
        )
    identity = "select system_identifier from pg_catalog.pg_control_system()"
    if _value(standby, identity) != _value(primary, identity):
        raise StandbyUnfitError(
            f"cannot read dumps of source {source!r} from sources.{source}.dump_dsn: it is a standby of another server"
        )


def wait_for_replay(standby: AnyConnection, primary: AnyConnection, *, source: str) -> Lsn:
    """Wait until the standby has replayed what the primary has flushed now; the position it has replayed.

    Raises:
        StandbyUnfitError: it does not get there in `PATIENCE_S`.
    """
    target = Lsn.parse(str(_value(primary, "select pg_catalog.pg_current_wal_flush_lsn()::text")))
    deadline = time.monotonic() + PATIENCE_S
    while True:
        replayed = Lsn.parse(str(_value(standby, "select coalesce(pg_catalog.pg_last_wal_replay_lsn(), '0/0')::text")))
        if replayed >= target:
            return replayed
        if time.monotonic() > deadline:
            raise StandbyUnfitError(
                f"cannot read dumps of source {source!r} from its standby: it is "
                f"{target.value - replayed.value:,} bytes behind; see pg_stat_replication on the primary"
            )
        time.sleep(_LOOK_EVERY_S)


def see_standby(standby: AnyConnection, *, replayed: Lsn) -> StandbySnapshot:
    """What the transaction's snapshot sees, which is taken by asking; `replayed` was asked for before it."""
    bounds = Snapshot.parse(str(_value(standby, "select pg_catalog.pg_current_snapshot()::text")))
    return StandbySnapshot(
        replayed=replayed.value, oldest_running=bounds.oldest_running, first_unknown=bounds.first_unknown
    )


def _value(connection: AnyConnection, question: str) -> object:
    row = connection.execute(question.encode()).fetchone()
    return row[0] if row else None
