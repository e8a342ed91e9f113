"""Dumps on demand: ask for one and see it through, pause, resume, cancel, and list what is under way.

A request goes to whoever holds the source's log: the capture service when one runs, else the caller
itself, which captures up to now while it is at it.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deltaworks.capture.continuity import LeaseHeldError
from deltaworks.capture.dump import TableDump, TextKey
from deltaworks.config import Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.log import recorder
from deltaworks.log.change_log import LogReader
from deltaworks.log.dump_requests import DumpOutcome, DumpRequest, DumpRequests, Ending, Wanted
from deltaworks.log.registry import log_of, open_reader
from deltaworks.operate.log import Place, opened
from deltaworks.schema import TableName

LOOK_EVERY_S = 0.5
"""How often a caller looks how far the service is with its dump."""

OnDumpProgress = Callable[["TableProgress"], None]


class DumpFailedError(TerminalError):
    """A dump ended without its rows: the request does not fit the source."""


class DumpPausedError(RetryableError):
    """A dump that somebody waits for was paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableProgress:
    """How far one table of a dump is: `done` of about `total` rows (or asked keys) were looked at."""

    table: str
    state: str
    rows: int
    done: int
    total: int | None
    eta: timedelta | None

    @classmethod
    def of(cls, table: str, cursor: TableDump, *, now: datetime) -> "TableProgress":
        """Read off a cursor; the time left is by the pace so far."""
        total = cursor.estimated_rows
        eta = None
        if total and cursor.scanned and cursor.began_at and cursor.state.value == "reading":
            eta = (now - cursor.began_at) * (max(total - cursor.scanned, 0) / cursor.scanned)
        return cls(table=table, state=cursor.state.value, rows=cursor.rows, done=cursor.scanned, total=total, eta=eta)

    @property
    def summary(self) -> str:
        """One line for people."""
        total = f" of {'about ' * (self.state != 'done')}{self.total:,}" if self.total is not None else ""
        left = f", {str(self.eta).partition('.')[0]} left" if self.eta is not None else ""
        return f"{self.table}: {self.state}, {self.done:,}{total} rows{left}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpStatus:
    """A dump under way, or one that has ended."""

    id: str
    state: str
    asked_at: datetime
    tables: Sequence[TableProgress] = ()
    outcome: DumpOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dumped:
    """A dump that was done."""

    outcome: DumpOutcome
    dumped_by: str

    @property
    def summary(self) -> str:
        """One line for people."""
        rows = sum(self.outcome.rows.values())
        missing = f", {len(self.outcome.missing):,} keys not found" if self.outcome.missing else ""
        return f"dump {self.outcome.id}: {rows:,} rows of {len(self.outcome.rows)} tables{missing}, by {self.dumped_by}"


def ask(
    config: Config, source: str, tables: Sequence[str] = (), *, keys: Sequence[TextKey] = (), where: str | None = None
) -> str:
    """Place a request and return its id at once; the capture service, or the next capture, sees to it.

    Raises:
        ConfigError: no such source.
        DumpFailedError: the parts of the request do not fit each other.
    """
    config.source(source)
    if keys and len(set(tables)) != 1:
        raise DumpFailedError(f"cannot dump keys of {len(set(tables))} tables: keys need exactly one table")
    if keys and where is not None:
        raise DumpFailedError("cannot dump keys under a condition; give one of the two")
    if where is not None and len(set(tables)) != 1:
        raise DumpFailedError(f"cannot put one condition to {len(set(tables))} tables: it needs exactly one table")
    request = DumpRequest.new(tables, keys=keys, where=where)
    _requests(config, source).ask(request)
    return request.id


def dump(
    config: Config,
    source: str,
    tables: Sequence[str] = (),
    *,
    keys: Sequence[TextKey] = (),
    where: str | None = None,
    on_asked: Callable[[str], None] | None = None,
    on_progress: OnDumpProgress | None = None,
) -> Dumped:
    """Dump tables (all when none is named), the rows of `keys`, or those a condition holds for; return when done.

    Stopping to wait, by an exception such as a keyboard interrupt, does not end a dump that the service is at.

    Raises:
        DumpFailedError: the source refuses the request, or it was cancelled.
        DumpPausedError: it was paused meanwhile.
        DeltaworksError: whatever capture raises.
    """
    dump_id = ask(config, source, tables, keys=keys, where=where)
    if on_asked is not None:
        on_asked(dump_id)
    outcome, dumped_by = _see_through(config, source, dump_id, on_progress)
    if outcome.ending is not Ending.DONE:
        raise DumpFailedError(
            f"the dump {dump_id} was {outcome.ending.value}: {outcome.error or 'somebody asked for it'}"
        )
    return Dumped(outcome=outcome, dumped_by=dumped_by)


def want(config: Config, source: str, dump_id: str, wanted: Wanted) -> None:
    """Pause, resume or cancel a dump.

    Raises:
        UnknownDumpError: none of that id is under way.
    """
    config.source(source)
    _requests(config, source).want(dump_id, wanted)


def dumps(config: Config, source: str) -> Sequence[DumpStatus]:
    """What is under way, oldest first, then what has ended, newest first."""
    config.source(source)
    requests, now = _requests(config, source), datetime.now(UTC)
    stored: Mapping[str, Any] = open_reader(config, source).end().progress.get("asked", {})
    under_way = [_status(request, stored.get(request.id), now=now) for request in requests.open()]
    ended = [
        DumpStatus(id=outcome.id, state=outcome.ending.value, asked_at=outcome.asked_at, outcome=outcome)
        for outcome in requests.outcomes()
    ]
    return [*under_way, *ended]


def parse_keys(config: Config, source: str, table: str, texts: Sequence[str]) -> list[TextKey]:
    """Read keys as they are typed: comma-separated like a line of CSV, or `@FILE` with a key on each line.

    A table with one key column takes any number of keys per text; one with more takes one key per text, its
    parts in the order of the key.

    Raises:
        DumpFailedError: the table is not captured, or a key has another number of parts than the table's.
    """
    with opened(config, source) as database:
        schemas = {
            spelling: schema for schema in database.tables() for spelling in (schema.name.short, str(schema.name))
        }
    schema = schemas.get(table) or schemas.get(str(TableName.parse(table)))
    if schema is None:
        raise DumpFailedError(f"no captured table {table!r}; known: {', '.join(config.source(source).tables)}")
    width = len(schema.key)
    rows = [tuple(row) for text in texts for row in _csv_rows(text)]
    if width == 1:
        return [(part,) for row in rows for part in row]
    for row in rows:
        if len(row) != width:
            raise DumpFailedError(
                f"cannot read a key of {table} with {len(row)} parts; it has {width}: {', '.join(schema.key)}"
            )
    return rows


def _csv_rows(text: str) -> Iterator[list[str]]:
    if not text.startswith("@"):
        yield from csv.reader([text], skipinitialspace=True)
        return
    try:
        with Path(text[1:]).open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.reader(file, skipinitialspace=True) if row)
    except OSError as error:
        raise DumpFailedError(f"cannot read keys from {text[1:]!r}: {error.strerror}") from error


def _see_through(
    config: Config, source: str, dump_id: str, on_progress: OnDumpProgress | None
) -> tuple[DumpOutcome, str]:
    """Wait for the holder of the log to end the dump, or be that holder."""
    requests, log = _requests(config, source), log_of(config, source)
    reader = log.reader()
    dumped_by = "the capture service"
    while (outcome := requests.outcome(dump_id)) is None:
        request = next((request for request in requests.open() if request.id == dump_id), None)
        if request is not None and request.wanted is Wanted.PAUSE:
            raise DumpPausedError(f"the dump {dump_id} is paused; run `deltaworks dump {source} --resume {dump_id}`")
        with opened(config, source) as database:
            try:
                place = Place.take(database, log)
            except LeaseHeldError:
                reader.wait(after_sequence=reader.end().sequence, timeout_s=LOOK_EVERY_S)
                _tell(reader, dump_id, on_progress)
                continue
            dumped_by = "this run"
            with closing(place):
                recorder.drain(
                    database,
                    place.writer,
                    reader,
                    requests=requests,
                    on_progress=lambda _: _tell(reader, dump_id, on_progress),
                )
    return outcome, dumped_by


def _tell(reader: LogReader, dump_id: str, on_progress: OnDumpProgress | None) -> None:
    stored = reader.end().progress.get("asked", {}).get(dump_id)
    if on_progress is not None and stored is not None:
        for progress in _tables(stored, now=datetime.now(UTC)):
            on_progress(progress)


def _status(request: DumpRequest, stored: Mapping[str, Any] | None, *, now: datetime) -> DumpStatus:
    tables = _tables(stored, now=now) if stored else []
    state = request.wanted.value if request.wanted is not Wanted.RUN else "running" if stored else "waiting"
    return DumpStatus(
        id=request.id, state={"pause": "paused"}.get(state, state), asked_at=request.asked_at, tables=tables
    )


def _tables(stored: Mapping[str, Any], *, now: datetime) -> list[TableProgress]:
    return [
        TableProgress.of(str(table), TableDump.from_json(cursor), now=now) for table, cursor in stored["tables"].items()
    ]


def _requests(config: Config, source: str) -> DumpRequests:
    return DumpRequests(config.dump_folder(source))
