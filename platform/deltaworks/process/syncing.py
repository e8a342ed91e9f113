"""Syncs an app's state beside its runner, so that steps run while the disk works."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class StateSync:
    """Makes what SQLite has committed to its write-ahead log survive the machine. Serves one thread.

    SQLite reads a log up to its last whole commit, whoever synced it; that is all that its own sync at a commit is for.
    """

    def __init__(self, state_file: Path) -> None:
        self._file = state_file.with_name(f"{state_file.name}-wal")
        self._descriptor: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._refused: OSError | None = None

    def begin(self) -> None:
        """Sync what is committed by now, in a thread of its own."""
        self._syncing = self._thread.submit(self._sync)

    def wait(self) -> None:
        """Return when all that was committed before the last `begin` is on disk; at first, what an earlier life left.

        Raises:
            OSError: the disk refused; nothing may leave that was made of this state.
        """
        if self._syncing is None:
            self.begin()
        assert self._syncing is not None  # noqa: S101 - begun above
        self._syncing.result()

    def close(self) -> None:
        """Wait for a sync that is under way, and let go of the file."""
        self._thread.shutdown()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _sync(self) -> None:
        # A disk that refused once may say yes to the next sync without the pages that it dropped.
        if self._refused is not None:
            raise self._refused
        try:
            self._sync_file()
        except OSError as error:
            self._refused = error
            raise

    def _sync_file(self) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._file, os.O_RDONLY)
            # The log may be new, and then its name has to survive as well.
            folder = os.open(self._file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        os.fdatasync(self._descriptor)
