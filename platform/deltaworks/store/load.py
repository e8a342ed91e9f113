"""Loads a change log into the lake: all its tables, up to one position, in one commit.

    log      ──group 7──group 8──group 9──►            position 0/5A10
    lake     version 41: load of groups ..7            version 42: groups 8..9, position 0/5A10

The commit carries the rows and the book entry `lake.deltaworks.load` which says how far they go, so a
load that dies anywhere either happened wholly or not at all, and the next one repeats nothing.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import duckdb

from deltaworks import faults
from deltaworks.errors import InvariantError, TerminalError
from deltaworks.log.change_log import GroupHeader, LogEnd, LogReader, StoredGroup
from deltaworks.log.taken import Taken
from deltaworks.position import START, Lsn
from deltaworks.store.apply import Applied
from deltaworks.store.lake import SYSTEM_SCHEMA, Lake, quoted
from deltaworks.store.statements import Statements
from deltaworks.store.tables import Tables, slices

_SQL = Statements("load.sql")


class LogRestartedError(TerminalError):
    """The log is not the one that the lake was loaded from."""


class BrokenLoadChainError(InvariantError):
    """The log's next group does not continue where the lake stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastLoad:
    """How far a log has been loaded: everything up to group `sequence`, change `next_offset`, `position`.

    `version` is the lake's version with exactly that, `None` where it was not asked for.
    """

    sequence: int = -1
    next_offset: int = 0
    position: Lsn = START
    loaded_at: datetime | None = None
    version: int | None = None


NOTHING_LOADED = LastLoad()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLoad:
    """What a load did to a table.

    `changes` were read, `upserted` rows written, `deleted` keys ended without a row (some may never
    have had one); `rows` is the table's row count afterwards.
    """

    changes: int
    upserted: int
    deleted: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One load. Sequences: `from_sequence` was loaded before, `to_sequence` is the last one loaded now.

    Offsets: `from_offset` is the first change of this load, `to_offset` one past the last.
    `version` is the lake's version afterwards; when nothing was new it is the version found.
    """

    log: str
    from_sequence: int
    to_sequence: int
    from_offset: int
    to_offset: int
    position: Lsn
    tables: Mapping[str, TableLoad] = field(default_factory=dict)
    version: int
    took_s: float

    @property
    def is_empty(self) -> bool:
        """Whether the log had nothing new, so that nothing was committed."""
        return self.from_sequence == self.to_sequence

    @property
    def changes(self) -> int:
        """Changes over all tables."""
        return self.to_offset - self.from_offset


def load(lake: Lake, reader: LogReader, *, log: str, up_to_sequence: int | None = None) -> LoadReport:
    """Bring schema `lake.<log>` to the log's end as of now, or to group `up_to_sequence`.

    Idempotent: what is loaded already is not read again. Tables appear when their first change does.

    Raises:
        LakeBusyError: other writers came first for too long; call again.
        LogRestartedError: the log ends before, or continues elsewhere than, what was loaded.
        SchemaConflictError: a source column changed its type in a way the lake cannot follow.
        OffsetRetiredError: the log no longer has what comes next.
    """
    started_s = time.monotonic()
    end = reader.end()
    target = end.sequence if up_to_sequence is None else min(up_to_sequence, end.sequence)
    last = last_load(lake, log)
    _check_is_in(end, last, log=log)
    if target <= last.sequence:
        return _report(log, last, last, tables={}, version=lake.version(), started_s=started_s)
    (before, after, tables, _), version = lake.commit(
        lambda connection: _load(connection, reader, log=log, up_to_sequence=target),
        message=_message(log),
        info=lambda result: _info(log, *result),
    )
    faults.reach("load.after_commit")
    return _report(log, before, after, tables=tables, version=version, started_s=started_s)


def _check_is_in(end: LogEnd, last: LastLoad, *, log: str) -> None:
    """Check that the log reaches to where the lake stands, and came there in the same way."""
    is_another = end.sequence == last.sequence and (end.offset, end.position) != (last.next_offset, last.position)
    if end.sequence < last.sequence or is_another:
        found = f"ends at {end.sequence}" + (f" with position {str(end.position)!r}" if is_another else "")
        raise LogRestartedError(
            f"cannot load log {log!r}: the lake has its groups up to {last.sequence}, the log {found};"
            " after a power cut start first what writes the log, which finds all that was durable; else"
            f" restore the log, or drop schema lake.{log} and its row in lake.{SYSTEM_SCHEMA}.load and load it anew"
        )


def begin_load(lake: Lake, log: str, oldest: GroupHeader) -> None:
    """Let the first load of a log begin with a group that is not its first one; one commit."""
    before = LastLoad(sequence=oldest.sequence - 1, next_offset=oldest.offset, position=oldest.previous_position)

    def begin(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(_SQL["create_schema"])
        connection.execute(_SQL["create_book"])
        _remember(connection, log, before, before)

    lake.commit(begin, message=f"begin {log}", info=lambda _: {"log": log, "to_sequence": before.sequence})


def last_load(lake: Lake, log: str) -> LastLoad:
    """The newest load of a log."""
    return _last(lake.connection, log) if lake.has(SYSTEM_SCHEMA, "load") else NOTHING_LOADED


def loaded_spans(lake: Lake, log: str) -> list[Taken]:
    """What each load of a log took of it, oldest first, as its commit says; those of versions that were expired are
    gone, and loads from before there was a proof are left out.
    """
    spans: list[Taken] = []
    for (stored,) in lake.connection.execute(_SQL["taken"], [_message(log)]).fetchall():
        taken = Taken.from_json(json.loads(stored))
        # A log that was loaded anew has nothing to do with what was loaded of it before.
        spans = [taken] if taken.after < 0 else [*spans, taken]
    return spans


def load_at(lake: Lake, log: str, *, up_to: Lsn) -> LastLoad:
    """The newest load of a log whose position is not after `up_to`, with the newest version that goes just that far.

    An older load than the last is looked up in the lake's history, which ends where versions were expired.
    """
    version = lake.version()
    try:
        row = lake.connection.execute(_SQL["last_at"].format(version=version), [log]).fetchone()
    except duckdb.CatalogException:
        # The book comes with the first load of any log.
        return NOTHING_LOADED
    if row is None or row[2] > up_to.value:
        row = lake.connection.execute(_SQL["history"], [_message(log), up_to.value]).fetchone()
        if row is None:
            return NOTHING_LOADED
        version, row = row[0], row[1:]
    return replace(_read_last(row), version=version)


def groups_between(
    reader: LogReader, *, log: str, after: LastLoad, up_to_sequence: int | None = None
) -> Iterator[StoredGroup]:
    """The groups that follow a load, checked to follow it without a gap.

    Raises:
        BrokenLoadChainError: a group is missing or the log is another one.
    """
    sequence, offset, position = after.sequence, after.next_offset, after.position
    for group in reader.read(after_sequence=after.sequence):
        header = group.header
        if up_to_sequence is not None and header.sequence > up_to_sequence:
            return
        found = (header.sequence, header.offset, header.previous_position)
        is_behind = header.sequence == sequence + 1 and header.offset >= offset
        is_gap = header.lost is not None and is_behind and header.may_follow(position)
        if found != (sequence + 1, offset, position) and not is_gap:
            raise BrokenLoadChainError(
                f"cannot load log {log!r}: expected group {sequence + 1} at offset {offset} after {str(position)!r},"
                f" found group {header.sequence} at offset {header.offset} after {str(header.previous_position)!r};"
                " the log was replaced or a group is lost: compare with `deltaworks verify`"
            )
        yield group
        sequence, offset, position = header.sequence, header.next_offset, header.position


def _load(
    connection: duckdb.DuckDBPyConnection, reader: LogReader, *, log: str, up_to_sequence: int
) -> tuple[LastLoad, LastLoad, dict[str, TableLoad], Taken]:
    connection.execute(_SQL["create_schema"])
    connection.execute(_SQL["create_book"])
    before = after = _last(connection, log)
    applied: defaultdict[str, Applied] = defaultdict(Applied)
    tables = Tables(connection, schema=log, applied_up_to=before.position)
    taken = Taken(after=before.sequence, up_to=before.sequence)
    for read in slices(groups_between(reader, log=log, after=before, up_to_sequence=up_to_sequence)):
        groups = faults.hand_over("load.read", read)
        batches = [batch for group in groups for batch in group.batches]
        for name, done in tables.apply(batches).items():
            applied[name] += done
        header = groups[-1].header
        taken = taken.then(Taken.of(batches, after=after.sequence, up_to=header.sequence))
        after = LastLoad(sequence=header.sequence, next_offset=header.next_offset, position=header.position)
    _remember(connection, log, before, after)
    faults.reach("load.before_commit")
    return before, after, {name: _table_load(connection, log, name, done) for name, done in applied.items()}, taken


def _last(connection: duckdb.DuckDBPyConnection, log: str) -> LastLoad:
    row = connection.execute(_SQL["last"], [log]).fetchone()
    return NOTHING_LOADED if row is None else _read_last(row)


def _read_last(row: tuple[Any, ...]) -> LastLoad:
    sequence, next_offset, position, loaded_at = row
    return LastLoad(sequence=sequence, next_offset=next_offset, position=Lsn(position), loaded_at=loaded_at)


def _remember(connection: duckdb.DuckDBPyConnection, log: str, before: LastLoad, after: LastLoad) -> None:
    connection.execute(_SQL["forget_last"], [log])
    connection.execute(
        _SQL["remember"],
        [
            log,
            before.sequence,
            after.sequence,
            before.next_offset,
            after.next_offset,
            after.position.value,
            after.next_offset - before.next_offset,
            datetime.now(UTC),
        ],
    )


def _table_load(connection: duckdb.DuckDBPyConnection, log: str, name: str, done: Applied) -> TableLoad:
    row = connection.execute(f"select count(*) from {quoted('lake', log, name)}").fetchone()
    rows = int(row[0]) if row is not None else 0
    return TableLoad(changes=done.changes, upserted=done.upserted, deleted=done.deleted, rows=rows)


def _message(log: str) -> str:
    return f"load {log}"


def _info(log: str, before: LastLoad, after: LastLoad, tables: Mapping[str, TableLoad], taken: Taken) -> dict[str, Any]:
    return {
        "log": log,
        "from_sequence": before.sequence,
        "to_sequence": after.sequence,
        "from_offset": before.next_offset,
        "to_offset": after.next_offset,
        "position": str(after.position),
        "position_value": after.position.value,
        "tables": {name: table.changes for name, table in tables.items()},
        "taken": taken.to_json(),
    }


def _report(
    log: str, before: LastLoad, after: LastLoad, *, tables: Mapping[str, TableLoad], version: int, started_s: float
) -> LoadReport:
    return LoadReport(
        log=log,
        from_sequence=before.sequence,
        to_sequence=after.sequence,
        from_offset=before.next_offset,
        to_offset=after.next_offset,
        position=after.position,
        tables=tables,
        version=version,
        took_s=time.monotonic() - started_s,
    )
