"""How far a log is behind its source while both are in use."""

import threading
import time
from collections import deque
from pathlib import Path

from deltaworks.log.local import LocalLogReader
from deltaworks.position import Lsn


class LagWatch:
    """How long what the source has committed takes to be in the log, at most."""

    def __init__(self, log: Path) -> None:
        self.longest_s = 0.0
        self._reader = LocalLogReader(log)
        self._committed: deque[tuple[Lsn, float]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def note(self, position: Lsn) -> None:
        """Something was committed at or before this position of a source that goes on committing."""
        self._committed.append((position, time.monotonic()))

    def stop(self) -> None:
        """Note no more."""
        self._stop.set()
        self._thread.join(30)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            reached, now = self._reader.end().position, time.monotonic()
            while self._committed and self._committed[0][0] <= reached:
                self.longest_s = max(self.longest_s, now - self._committed.popleft()[1])
