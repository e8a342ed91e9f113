"""Reads a log on Kafka: the topic of groups says where the parts of each group lie; see `place`."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from deltaworks.log.change_log import (
    EMPTY_END,
    CorruptLogError,
    GroupHeader,
    LogAwayError,
    LogEnd,
    OffsetRetiredError,
    StoredGroup,
)
from deltaworks.log.header import check_follows, check_not_ahead, end_after
from deltaworks.log.kafka.client import Client
from deltaworks.log.kafka.reading import Session, headers_of
from deltaworks.log.kafka.records import GroupRecord, check_data, put_together

LOOK_S = 0.02
"""How often `wait` asks for the end; a question costs the broker next to nothing."""

BLOCK = 512
"""Offsets of the topic of groups that are read at once when going backwards."""


class KafkaLogReader:
    """Reads a log's topics; sees committed groups only. Thread-safe: every call has a consumer of its own."""

    def __init__(self, client: Client, *, must_exist: bool = False) -> None:
        """`must_exist`: a topic that is not there is no empty log, for a writer that has seen it."""
        self._client = client
        self._must_exist = must_exist
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._end = EMPTY_END
        self._last: GroupRecord | None = None
        self._seen = 0
        self._log: str | None = None
        self._places: dict[int, int] = {}

    def end(self) -> LogEnd:
        """The end as of now; one question to a broker when nothing was appended since the last call.

        Raises:
            LogAwayError: the brokers do not answer.
            CorruptLogError: the topics were made anew since this reader began.
        """
        self._look()
        return self._end

    def oldest(self) -> GroupHeader | None:
        """See `LogReader.oldest`."""
        self.end()
        with self._session() as session:
            bounds = session.bounds(self._client.groups, 0, must_exist=self._must_exist)
            low, end = (0, 0) if bounds is None else (bounds[0], self._seen)
            while low < end:
                for record in session.group_records(low, min(low + BLOCK, end)):
                    if record.header is not None:
                        return record.header
                low += BLOCK
        return None

    def last(self) -> GroupRecord | None:
        """The last record of the topic of groups, of whichever kind; `None` of a log that was never opened."""
        self._look()
        return self._last

    def read(self, *, after_sequence: int, max_changes: int | None = None) -> Iterator[StoredGroup]:
        """See `LogReader.read`; the end is that of this call, not of the first step."""
        end = self.end()
        check_not_ahead(after_sequence, end, where=repr(self._client.topics))
        return self._read(after_sequence + 1, end.sequence, self._seen, max_changes)

    def headers_backwards(self) -> Iterator[GroupHeader]:
        """Headers from the last group to the oldest that is kept."""
        self.end()
        with self._session() as session:
            bounds = session.bounds(self._client.groups, 0, must_exist=self._must_exist)
            low, high = (0, 0) if bounds is None else (bounds[0], self._seen)
            while high > low:
                start = max(low, high - BLOCK)
                block = list(session.group_records(start, high))
                yield from (record.header for record in reversed(block) if record.header is not None)
                high = start

    def wait(self, *, after_sequence: int, timeout_s: float) -> bool:
        """See `LogReader.wait`."""
        check_not_ahead(after_sequence, self.end(), where=repr(self._client.topics))
        deadline = time.monotonic() + timeout_s
        while self.end().sequence <= after_sequence:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(LOOK_S, left_s))
        return True

    def wait_committed(self, offset: int, *, deadline: float) -> None:
        """Wait until the record of the topic of groups at this offset is visible, by the monotonic clock.

        Raises:
            LogAwayError: it was not by then.
        """
        with self._session() as session:
            while (bounds := session.bounds(self._client.groups, 0, must_exist=self._must_exist)) is None or bounds[
                1
            ] <= offset:
                if time.monotonic() > deadline:
                    raise LogAwayError(
                        f"cannot see the last group of the log {self._client.topics!r}: the brokers have not ended its "
                        "transaction yet; it is asked for again"
                    )
                time.sleep(LOOK_S / 20)

    def close(self) -> None:
        """Leave the brokers; the next call comes back to them."""
        with self._lock:
            sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.close()

    def _look(self) -> None:
        """Bring what is known of the end to now."""
        with self._session() as session, self._lock:
            bounds = session.bounds(self._client.groups, 0, must_exist=self._must_exist)
            if bounds is None or bounds[1] < self._seen:
                if self._seen:
                    raise self._made_anew()
                return
            low, high = bounds
            if high == self._seen:
                return
            for record in session.group_records(self._seen, high) if self._seen else self._newest(session, low, high):
                self._take(record)
            self._seen = high

    def _newest(self, session: Session, low: int, high: int) -> list[GroupRecord]:
        """The records from the last group on; all of them where there is no group."""
        back = 2
        while True:
            start = max(low, high - back)
            records = list(session.group_records(start, high))
            if start == low or any(record.header is not None for record in records):
                return records
            back *= 8

    def _take(self, record: GroupRecord) -> None:
        if self._log is None:
            self._log = record.log
        if record.log != self._log:
            raise self._made_anew()
        self._last = record
        if record.header is not None:
            self._end = end_after(record.header)
            self._places = {record.header.sequence: record.offset}

    def _made_anew(self) -> CorruptLogError:
        return CorruptLogError(
            f"cannot read the log {self._client.topics!r}: topic {self._client.groups!r} was made anew or lost its "
            "tail since it was read; remove what this reader feeds and start over after a dump of the source"
        )

    def _read(self, sequence: int, last: int, end: int, max_changes: int | None) -> Iterator[StoredGroup]:
        if sequence > last:
            return
        left = math.inf if max_changes is None else max(1, max_changes)
        previous: GroupHeader | None = None
        where = repr(self._client.topics)
        with self._session() as groups, self._session() as changes:
            for record in groups.group_records(self._locate(groups, sequence, end), end):
                header = record.header
                if header is None or header.sequence < sequence:
                    continue
                if previous is None and header.sequence > sequence:
                    raise self._retired(sequence, oldest=header.sequence)
                if record.log != self._log:
                    raise self._made_anew()
                check_follows(header, sequence=sequence, previous=previous, where=where)
                yield StoredGroup(header, put_together(self._streams(changes, record, header)))
                previous = header
                sequence += 1
                left -= header.next_offset - header.offset
                if sequence > last or left <= 0:
                    return

    def _streams(self, changes: Session, record: GroupRecord, header: GroupHeader) -> dict[int, list[bytes]]:
        streams: dict[int, list[bytes]] = {}
        for batch, partition, *offsets in record.pieces:
            parts = []
            for offset in offsets:
                message = changes.change_at(partition, offset)
                check_data(headers_of(message), sequence=header.sequence, batch=batch, where=repr(self._client.changes))
                parts.append(message.value() or b"")
            streams.setdefault(batch, []).append(parts[0] if len(parts) == 1 else b"".join(parts))
        return streams

    def _locate(self, session: Session, sequence: int, end: int) -> int:
        """An offset of the topic of groups at or a little before the group."""
        bounds = session.bounds(self._client.groups, 0, must_exist=self._must_exist)
        low = 0 if bounds is None else bounds[0]
        known = self._places.get(sequence)
        if known is not None and known >= low:
            return known
        if sequence == 0:
            return low
        high = end
        while high - low > 2 * BLOCK:
            middle = (low + high) // 2
            found = next((each for each in session.group_records(middle, high) if each.header is not None), None)
            if found is None or found.header is None or found.header.sequence >= sequence:
                high = middle
            else:
                low = found.offset
        return low

    def _retired(self, sequence: int, *, oldest: int) -> OffsetRetiredError:
        return OffsetRetiredError(
            f"cannot read group {sequence} of the log {self._client.topics!r}: the brokers keep groups from {oldest} "
            "on; run `deltaworks dump SOURCE` and start what reads this log over, and raise the topics' retention.ms"
        )

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with self._lock:
            session = self._sessions.pop() if self._sessions else None
        session = session or Session(self._client)
        try:
            yield session
        except BaseException:
            session.close()
            raise
        session.rest()
        with self._lock:
            self._sessions.append(session)
