"""The change log: bring it to now, or be the service that keeps it there."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Self

import structlog

from deltaworks.capture import registry
from deltaworks.capture.continuity import LeaseHeldError, LeaseLostError, SourceLease
from deltaworks.capture.registry import open_source
from deltaworks.capture.source import Finding, Source
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.log import recorder
from deltaworks.log.change_log import FencedError, LogReader, LogWriter
from deltaworks.log.dump_requests import DumpRequests
from deltaworks.log.dumping import DumpProgress
from deltaworks.log.registry import LogPlace, log_of
from deltaworks.operate.lease import leased, taken_unless_done, warm_up
from deltaworks.position import Lsn
from deltaworks.schema import TableSchema

LEAVE_PATIENCE_S = 1.0
"""How long a writer that lost its lease may take to let go of the log; then it is taken from it."""

logger = structlog.get_logger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with what is worked on, how much is done, and how much there is as far as known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The log after a `capture`. `changes` counts what this call added, by the table's full name."""

    source: str
    position: Lsn
    offset: int
    captured_by: str
    changes: Mapping[str, int]
    schemas: Sequence[TableSchema]

    @property
    def summary(self) -> str:
        """One line for people."""
        added = sum(self.changes.values())
        return f"{self.source}: {added:,} changes captured by {self.captured_by}, log at {self.position}"


def check(config: Config, source: str) -> Sequence[Finding]:
    """List what keeps the source from being captured, and its log from being archived."""
    with opened(config, source) as database:
        found = list(database.check())
    try:
        log_of(config, source).check()
    except DeltaworksError as error:
        what, _, mend = str(error).partition("; ")
        found.append(Finding(what=what, mend=mend or "look at sources." + source + ".log in deltaworks.yaml"))
    return found


def least_role(config: Config, source: str) -> str:
    """SQL that makes a role which can do all that capture does with this source and nothing more; asks no server."""
    with opened(config, source) as database:
        return database.least_role()


def capture(config: Config, source: str, *, on_progress: OnProgress | None = None) -> Captured:
    """Bring the change log to now, by a drain here or by waiting for the service.

    Raises:
        ServiceSlowError: the service did not get there in `SERVICE_PATIENCE_S`.
        DeltaworksError: whatever capture raises.
    """
    log = log_of(config, source)
    reader = log.reader()
    with opened(config, source) as database:
        captured_by, before = _bring_to_now(
            database, log, reader, on_progress, DumpRequests(config.dump_folder(source))
        )
        schemas = database.tables()
    end = reader.end()
    return Captured(
        source=source,
        position=end.position,
        offset=end.offset,
        captured_by=captured_by,
        changes=_changes_since(reader, before),
        schemas=schemas,
    )


def follow_capture(config: Config, source: str, *, stop: threading.Event) -> None:
    """Be the capture service: wait for the lease, then follow the source until `stop`.

    Raises:
        TerminalError: a person has to act; everything up to the log's end is safe.
    """
    log, requests = log_of(config, source), DumpRequests(config.dump_folder(source))
    registry.warm_up(config.source(source))
    warm_up()
    while not stop.is_set():
        with opened(config, source) as database:
            take = partial(Place.take, database, log)
            with leased(take, (RetryableError, FencedError), stop=stop) as place:
                if place is None:
                    return
                try:
                    recorder.follow(
                        database,
                        place.writer,
                        log.reader(),
                        stop=stop,
                        requests=requests,
                        lease=place.lease,
                        canary_s=config.source(source).canary_s,
                        mending=log.mending(place.writer),
                    )
                except (LeaseLostError, FencedError) as error:
                    # The one that took over is the service now; this one is there for when that dies.
                    logger.warning("capture lost its place and stands by", source=source, error=str(error))


@dataclass(frozen=True, slots=True)
class Place:
    """The place of the one reader: the lease on the source, then the lock of its log."""

    lease: SourceLease
    writer: LogWriter

    @classmethod
    def take(cls, database: Source, log: LogPlace) -> Self:
        """Take both; a log whose writer has no lease and does not leave is taken over."""
        lease = database.lease()
        try:
            return cls(lease, _open_log(log, mends=database.repairs_gaps))
        except BaseException:
            lease.close()
            raise

    def close(self) -> None:
        """Let another reader have it. The log first: the lease says that it is free."""
        self.writer.close()
        self.lease.close()


def _open_log(log: LogPlace, *, mends: bool) -> LogWriter:
    deadline = time.monotonic() + LEAVE_PATIENCE_S
    while True:
        try:
            return log.writer(mends=mends)
        except FencedError:
            if time.monotonic() > deadline:
                return log.take_over(mends=mends)
            time.sleep(0.05)


@contextmanager
def opened(config: Config, source: str) -> Iterator[Source]:
    """The source of that name, let go of at the end."""
    folder = config.home / "capture" / source
    with closing(open_source(source, config.source(source), folder=folder)) as database:
        yield database


def _bring_to_now(
    database: Source, log: LogPlace, reader: LogReader, on_progress: OnProgress | None, requests: DumpRequests
) -> tuple[str, int]:
    """Who did it, and the log's last group before that."""
    others = _Others(database, reader)
    place = taken_unless_done(
        lambda: Place.take(database, log),
        LeaseHeldError,
        is_done=others.are_there,
        what=f"the capture service of {database.name!r}",
    )
    if place is None:
        return "the capture service", others.began_at
    with closing(place):
        # Whatever is damaged at the end is mended by now, so only now it can be asked for.
        before = place.writer.end().sequence
        recorder.drain(
            database,
            place.writer,
            reader,
            on_progress=_dump_progress(on_progress),
            requests=requests,
            mending=log.mending(place.writer),
        )
    return "this run", before


def _changes_since(reader: LogReader, sequence: int) -> Mapping[str, int]:
    """Changes after a group, by the table's full name."""
    changes: Counter[str] = Counter()
    for header in takewhile(lambda header: header.sequence > sequence, reader.headers_backwards()):
        changes.update(header.tables)
    return changes


def _dump_progress(on_progress: OnProgress | None) -> Callable[[DumpProgress], None] | None:
    if on_progress is None:
        return None

    def tell(dump: DumpProgress) -> None:
        total = dump.rows if dump.is_done else dump.estimated_rows
        on_progress(f"dump {dump.table.short}", dump.rows, total or dump.rows)

    return tell


class _Others:
    """Whoever captures instead of this run: a mark is committed when this is first asked, and looked for in the log."""

    def __init__(self, database: Source, reader: LogReader) -> None:
        self._database = database
        self._reader = reader
        self._target: Lsn | None = None
        self.began_at = -1
        """The log's last group then."""

    def are_there(self) -> bool:
        """Whether the log has all that was visible."""
        if self._target is None:
            self.began_at = self._reader.end().sequence
            self._target = self._database.current_position()
            self._database.mark(f"wait:{uuid.uuid4().hex}")
        return self._reader.end().position >= self._target
