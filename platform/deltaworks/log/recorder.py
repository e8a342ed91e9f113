"""Records a source into its change log: stream, dump merge, group, append, confirm.

    stream.next ──► remember ──► settle a chunk at its mark ──► append (durable) ──► confirm
                                  chunk + mark ◄── next chunk of the dump, one at a time

Whatever line the process dies on, the log ends at a whole group, and the group holds the position
and the cursors of all dumps: one write. The source is confirmed only after that write returned, so
the worst a crash does is that the last chunk is read once more.
"""

import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import structlog

from deltaworks import faults
from deltaworks.capture.proof import Proof
from deltaworks.capture.source import ChangeStream, Slice, Source
from deltaworks.errors import RetryableError
from deltaworks.log.change_log import Group, LogFullError, LogReader, LogWriter
from deltaworks.log.dump_requests import DumpRequests
from deltaworks.log.dumping import Dumping, OnProgress
from deltaworks.position import START, Lsn

IDLE_S = 0.25
"""How long one wait for changes lasts; the time a stop takes on an idle source."""

EMPTY_GROUP_EVERY_S = 10.0
"""How often the log notes a position without changes, so that the source can let go of its own log."""

FULL_LOG_PATIENCE_S = 30.0
"""How long a drain waits for space. A service waits until it is stopped."""

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 15.0

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What a run recorded. `reads` counts dumped rows per table's full name, `changes` the streamed ones."""

    changes: int = 0
    reads: Mapping[str, int] = field(default_factory=dict)
    transactions: int = 0
    groups: int = 0
    position: Lsn = START
    duration_s: float = 0.0


def drain(
    source: Source,
    writer: LogWriter,
    reader: LogReader,
    *,
    on_progress: OnProgress | None = None,
    requests: DumpRequests | None = None,
) -> RecordReport:
    """Record up to now: dumps are complete, and everything committed before the call is in the log.

    `reader` reads the log that `writer` writes; `requests` are dumps that were asked for, which end here
    too unless they are paused. Works on an idle source: it writes a mark and waits for that.

    Raises:
        RetryableError: the source is away, its slot is held, or the log is full; a later call goes on.
        TerminalError: the source cannot be captured as it is.
    """
    run = _Run(source, writer, reader, on_progress=on_progress, requests=requests, stop=None)
    run.record(until_drained=True)
    return run.report()


def follow(
    source: Source,
    writer: LogWriter,
    reader: LogReader,
    *,
    stop: threading.Event,
    on_progress: OnProgress | None = None,
    requests: DumpRequests | None = None,
) -> RecordReport:
    """Record until `stop` is set. Reconnects after a `RetryableError`, with growing pauses.

    Raises:
        TerminalError: the source cannot be captured as it is, or the log is lost to another writer.
    """
    run = _Run(source, writer, reader, on_progress=on_progress, requests=requests, stop=stop)
    pause_s = FIRST_RETRY_S
    while not stop.is_set():
        before = run.groups
        try:
            run.record(until_drained=False)
        except RetryableError as error:
            pause_s = FIRST_RETRY_S if run.groups > before else min(pause_s * 2, LAST_RETRY_S)
            logger.warning("capture is interrupted", source=source.name, error=str(error), retry_in_s=pause_s)
            source.close()
            stop.wait(pause_s)
    return run.report()


class _Run:
    """One call of `drain` or `follow`; `record` is one connection's life."""

    def __init__(
        self,
        source: Source,
        writer: LogWriter,
        reader: LogReader,
        *,
        on_progress: OnProgress | None,
        requests: DumpRequests | None,
        stop: threading.Event | None,
    ) -> None:
        self.groups = 0
        self._source = source
        self._writer = writer
        self._reader = reader
        self._on_progress = on_progress
        self._requests = requests
        self._stop = stop
        self._began_at = time.monotonic()
        self._changes = 0
        self._transactions = 0
        self._reads: dict[str, int] = {}
        self._start()

    def record(self, *, until_drained: bool) -> None:
        """Record over one connection until drained, stopped, or an error ends it."""
        self._start()
        self._source.prepare()
        self._dumping.load(self._writer.end().progress)
        with self._source.open(resume_after=self._writer.end().position) as stream, closing(self._dumping):
            self._dumping.recall()
            target = self._write_mark() if until_drained else None
            while not self._is_over(target):
                self._step(stream)

    def report(self) -> RecordReport:
        """What was recorded so far."""
        return RecordReport(
            changes=self._changes,
            reads=dict(self._reads),
            transactions=self._transactions,
            groups=self.groups,
            position=self._writer.end().position,
            duration_s=time.monotonic() - self._began_at,
        )

    def _start(self) -> None:
        """Forget everything that belongs to one connection. Marks carry the run's id, so a dead run's say nothing."""
        self._id = uuid.uuid4().hex
        self._marks_written = 0
        self._marks_met: set[str] = set()
        self._dumping = Dumping(
            source=self._source,
            reader=self._reader,
            write_mark=self._write_mark,
            on_progress=self._on_progress,
            requests=self._requests,
        )
        self._appended_at = time.monotonic()

    def _is_over(self, target: str | None) -> bool:
        if self._stop is not None and self._stop.is_set():
            return True
        return (
            target is not None and target in self._marks_met and self._dumping.is_done and not self._dumping.is_unsaved
        )

    def _step(self, stream: ChangeStream) -> None:
        wait_s = self._dumping.advance()
        has_to_save = self._dumping.is_unsaved and not self._dumping.is_in_flight
        taken = stream.next(timeout_s=0.0 if has_to_save else min(wait_s, IDLE_S))
        if taken is None:
            if self._dumping.is_unsaved:
                self._record_group(stream, Slice(position=self._writer.end().position))
            return
        for batch in taken.batches:
            self._dumping.remember(batch)
        reads = self._dumping.settle(taken)
        if taken.mark is not None:
            self._marks_met.add(taken.mark)
        if taken.batches or reads or self._must_note(taken):
            self._record_group(stream, replace(taken, batches=(*taken.batches, *reads)))

    def _must_note(self, taken: Slice) -> bool:
        """Whether a slice without changes is worth a group of its own."""
        is_due = time.monotonic() - self._appended_at >= EMPTY_GROUP_EVERY_S
        # A mark of ours settles a chunk or ends a drain; one of somebody else means that they wait for it.
        return self._dumping.is_unsaved or is_due or taken.mark is not None or taken.is_awaited

    def _record_group(self, stream: ChangeStream, taken: Slice) -> None:
        group = Group(
            batches=taken.batches,
            position=taken.position,
            previous_position=self._writer.end().position,
            transaction_count=taken.transaction_count,
            progress=self._dumping.to_json(),
            proof=Proof.of(taken.batches, after=self._writer.end().chain, transaction_count=taken.transaction_count),
        )
        faults.reach("capture.before_append")
        self._append(group, stream)
        faults.reach("capture.after_append")
        # Only now may the source forget it: append returns when the group is on disk.
        stream.confirm(group.position)
        faults.reach("capture.after_confirm")
        self._dumping.saved()
        self._count(group)

    def _append(self, group: Group, stream: ChangeStream) -> None:
        began_at, pause_s = time.monotonic(), FIRST_RETRY_S
        while True:
            try:
                self._writer.append(group)
                return
            except LogFullError as error:
                logger.error("the change log is full; the source waits", source=self._source.name, error=str(error))
                if self._stop is None and time.monotonic() - began_at > FULL_LOG_PATIENCE_S:
                    raise
                # The old position again: it says that we live, so the server keeps the connection.
                stream.confirm(group.previous_position)
            if self._pause(pause_s):
                raise LogFullError(f"cannot append to the log of {self._source.name!r} before the stop: it is full")
            pause_s = min(pause_s * 2, LAST_RETRY_S)

    def _pause(self, seconds: float) -> bool:
        """Wait; `True` when the run was stopped meanwhile."""
        if self._stop is not None:
            return self._stop.wait(seconds)
        time.sleep(seconds)
        return False

    def _count(self, group: Group) -> None:
        self.groups += 1
        self._appended_at = time.monotonic()
        self._transactions += group.transaction_count
        for batch in group.batches:
            if batch.rows.column("_op")[0].as_py() == "r":
                name = str(batch.schema.name)
                self._reads[name] = self._reads.get(name, 0) + len(batch)
            else:
                self._changes += len(batch)

    def _write_mark(self) -> str:
        self._marks_written += 1
        mark = f"{self._id}:{self._marks_written}"
        self._source.mark(mark)
        return mark
