"""The change log in memory: the same contract, for tests and for trying an app out."""

import math
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Self

from deltaworks.log.change_log import (
    EMPTY_END,
    FencedError,
    Group,
    GroupHeader,
    LogEnd,
    StoredGroup,
)
from deltaworks.log.header import check_not_ahead, end_after, next_header


class MemoryLog:
    """A log that lives as long as the object. Thread-safe; one writer at a time."""

    def __init__(self) -> None:
        self._groups: list[StoredGroup] = []
        self._epoch = 0
        self._is_held = False
        self._changed = threading.Condition()

    def writer(self) -> "MemoryLogWriter":
        """Take the log.

        Raises:
            FencedError: another writer holds it.
        """
        with self._changed:
            if self._is_held:
                raise FencedError(
                    f"cannot write the log: the writer of epoch {self._epoch!r} holds it; close that first"
                )
            self._is_held = True
            self._epoch += 1
            return MemoryLogWriter(self, epoch=self._epoch)

    def reader(self) -> "MemoryLogReader":
        """A reader of it; any number may read."""
        return MemoryLogReader(self)

    def _end(self) -> LogEnd:
        return end_after(self._groups[-1].header) if self._groups else EMPTY_END

    def _visible_end(self) -> LogEnd:
        """The end without the parts of a transaction whose last part is missing."""
        last = next((group.header for group in reversed(self._groups) if not group.header.is_partial), None)
        return end_after(last) if last is not None else EMPTY_END

    def _discard_partial(self) -> None:
        with self._changed:
            del self._groups[self._visible_end().sequence + 1 :]

    def _append(self, group: Group, epoch: int) -> GroupHeader:
        with self._changed:
            header = next_header(group, end=self._end(), epoch=epoch, appended_at=datetime.now(UTC))
            self._groups.append(StoredGroup(header, group.batches))
            self._changed.notify_all()
            return header

    def _release(self) -> None:
        self._discard_partial()
        with self._changed:
            self._is_held = False


class MemoryLogWriter:
    """The writer of a `MemoryLog`."""

    def __init__(self, log: MemoryLog, *, epoch: int) -> None:
        self.epoch = epoch
        self._log = log
        self._is_closed = False

    def end(self) -> LogEnd:
        """The end after the last append."""
        return self._log._end()

    def append(self, group: Group) -> GroupHeader:
        """Append a group; visible to readers when this returns.

        Raises:
            BrokenChainError: `group.previous_position` is not where the log ends.
            FencedError: this writer was closed.
        """
        if self._is_closed:
            raise FencedError(f"cannot write the log with epoch {self.epoch!r}: this writer was closed; open it again")
        return self._log._append(group, self.epoch)

    def discard_partial(self) -> None:
        """See `LogWriter.discard_partial`."""
        self._log._discard_partial()

    def close(self) -> None:
        """Let another writer in; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._log._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryLogReader:
    """A reader of a `MemoryLog`."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def end(self) -> LogEnd:
        """The end as of now."""
        return self._log._visible_end()

    def oldest(self) -> GroupHeader | None:
        """The header of the first group."""
        return self._log._groups[0].header if self.end().sequence >= 0 else None

    def read(self, *, after_sequence: int, max_changes: int | None = None) -> Iterator[StoredGroup]:
        """See `LogReader.read`."""
        end = self.end()
        check_not_ahead(after_sequence, end, where="the log in memory")
        return self._read(after_sequence + 1, end.sequence, max_changes)

    def headers_backwards(self) -> Iterator[GroupHeader]:
        """Headers from the last group to the first."""
        for sequence in range(self.end().sequence, -1, -1):
            yield self._log._groups[sequence].header

    def wait(self, *, after_sequence: int, timeout_s: float) -> bool:
        """See `LogReader.wait`."""
        check_not_ahead(after_sequence, self.end(), where="the log in memory")
        deadline = time.monotonic() + timeout_s
        with self._log._changed:
            while self._log._visible_end().sequence <= after_sequence:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._log._changed.wait(left_s):
                    return self._log._visible_end().sequence > after_sequence
        return True

    def _read(self, sequence: int, last: int, max_changes: int | None) -> Iterator[StoredGroup]:
        left = math.inf if max_changes is None else max(1, max_changes)
        while sequence <= last and left > 0:
            group = self._log._groups[sequence]
            yield group
            left -= group.header.next_offset - group.header.offset
            sequence += 1
