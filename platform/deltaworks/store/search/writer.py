"""The sink: documents into a search index, addressed by key and external version.

    write ──► flush ──► recent documents: durable and seen ──► a second later ──► tantivy's commit, in a thread

Both have the version of every key, of deleted ones too. So a crash leaves one state, the last flush, and a late write
is refused by it. What a crash leaves in both is committed again: the newest version of a key is the same one.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError, document_json
from deltaworks.process.sink import Document, Refusal, key_text
from deltaworks.store.search.committed import CommittedIndex, IndexWriteError, committing
from deltaworks.store.search.layout import (
    SPEC_FILE,
    TANTIVY_FILE,
    FreshnessRecord,
    IndexLayoutError,
    how_to_rebuild,
    replace_text,
)
from deltaworks.store.search.recent import Recent, RecentFile, left_behind
from deltaworks.store.search.spec import LAYOUT, SearchIndex, values_at

_KEY_BYTES = 32_000
"""tantivy drops terms of more than 65,530 bytes without a word."""

COMMIT_EVERY_S = 1.0
"""How long documents stay recent while others come: readers hold the recent ones in memory."""
RECENT_AT_MOST = 1_000
"""So many documents are committed without being recent first: a commit is worth its while then."""
_RECENT_BYTES_AT_MOST = 16_000_000
"""Likewise of so many bytes: every reader holds them in memory."""
_COMMITS_BEHIND = 4
"""With so many times as much recent, a flush waits for the commit that is under way."""


class SearchWriter:
    """The one writer of an index; made by `SearchIndex.open`. Serves one thread."""

    def __init__(
        self,
        folder: Path,
        spec: SearchIndex,
        committed: CommittedIndex,
        recent: list[RecentFile],
        *,
        commit_every_s: float,
        recent_at_most: int,
    ) -> None:
        self.name = spec.name
        self._folder = folder
        self._spec = spec
        self._committed = committed
        self._recent = recent
        """Oldest first. New documents go into the last one if it was made by this writer and is not being committed."""
        self._number = recent[-1].number if recent else 0
        self._open: RecentFile | None = None
        self._committing: tuple[Future[None], list[RecentFile]] | None = None
        self._committed_at = -math.inf
        self._commit_every_s = commit_every_s
        self._recent_at_most = recent_at_most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"commit-{spec.name}")
        self._has_failed = False
        self._is_closed = False
        self._pending: dict[str, Recent] = {}
        self._refusals: dict[str, Refusal] = {}
        self._freshness = FreshnessRecord.load(folder) or FreshnessRecord(flushed_at=datetime.now(UTC))
        self._newest = self._freshness.committed_at

    @classmethod
    def open(
        cls,
        folder: Path,
        spec: SearchIndex,
        *,
        commit_every_s: float = COMMIT_EVERY_S,
        recent_at_most: int = RECENT_AT_MOST,
    ) -> Self:
        """See `SearchIndex.open`."""
        folder.mkdir(parents=True, exist_ok=True)
        _check_layout(folder, spec)
        committed = CommittedIndex.open(folder, spec)
        try:
            record = FreshnessRecord.load(folder)
            with committing(folder):
                recent = left_behind(folder, dict(record.recent) if record is not None else {})
        except BaseException:
            committed.close(has_failed=False)
            raise
        # Boosts and display may change without a rebuild; the newest declaration counts.
        replace_text(folder / SPEC_FILE, spec.to_json())
        return cls(folder, spec, committed, recent, commit_every_s=commit_every_s, recent_at_most=recent_at_most)

    def write(self, documents: Sequence[Document]) -> None:
        """See `Sink.write`. Nothing is durable or visible before `flush`."""
        self._check_is_usable()
        keys = [key_text(document.key) for document in documents]
        versions = self._versions(keys)
        for key, document in zip(keys, documents, strict=True):
            version = versions.get(key)
            if version is not None and document.version < version:
                continue
            try:
                self._pending[key] = self._recent_of(key, document)
            except UnsupportedBodyError as error:
                self._refusals[key] = Refusal(key=document.key, version=document.version, reason=str(error))
                continue
            versions[key] = document.version
            self._refusals.pop(key, None)
            if self._newest is None or document.committed_at > self._newest:
                self._newest = document.committed_at

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        """See `Sink.flush`: one write, synced; without new documents only the record moves.

        Raises:
            IndexWriteError: the disk did not take it; what was written since the last flush is gone. Or a commit of
                earlier flushes failed: nothing is lost, the next writer commits it again.
        """
        self._check_is_usable()
        try:
            with committing(self._folder):
                self._take_pending()
                # A replay flushes older positions; what was in the index then is in it still.
                self._save_record(max(up_to, self._freshness.position), committed_at=self._newest)
        except IndexWriteError:
            # Documents since the last flush may be lost: a later flush of this writer must not claim them.
            self._has_failed = True
            raise
        self._pending.clear()
        if self._committing is None and self._recent and self._is_commit_due():
            self._begin_commit()
        refusals = list(self._refusals.values())
        self._refusals.clear()
        return refusals

    def close(self) -> None:
        """Let another writer in; what was not flushed is dropped. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._thread.shutdown()
        has_failed = self._has_failed or (self._committing is not None and self._committing[0].exception() is not None)
        for file in self._recent:
            file.close()
        self._committed.close(has_failed=has_failed)

    def _check_is_usable(self) -> None:
        if self._is_closed or self._has_failed:
            state = "failed" if self._has_failed else "was closed"
            raise IndexWriteError(
                f"cannot write the search index {str(self._folder)!r}: this writer {state}; open it again"
            )

    def _take_pending(self) -> None:
        """Make what is pending durable."""
        size = sum(len(document.body or b"") for document in self._pending.values())
        is_much = self._is_much(len(self._pending), size)
        self._settle(is_waiting=is_much or self._is_much(*self._recent_size(), times=_COMMITS_BEHIND))
        if is_much:
            if self._recent:
                # Before, so that no older document hides a part of this flush.
                self._begin_commit()
                self._settle(is_waiting=True)
            self._committed.take(self._pending.values(), is_awaited=True)
        elif self._pending:
            self._append()

    def _append(self) -> None:
        if self._open is None:
            # By the clock, so that a record of an earlier life never means a file of this one.
            self._number = max(self._number + 1, time.time_ns() // 1_000_000)
            self._open = RecentFile.create(self._folder, self._number)
            self._recent.append(self._open)
        self._open.append(self._pending)

    def _save_record(self, position: Lsn, *, committed_at: datetime | None) -> None:
        self._freshness = FreshnessRecord(
            position=position,
            committed_at=committed_at,
            flushed_at=datetime.now(UTC),
            commit=self._committed.commit,
            recent=tuple((file.number, file.size) for file in self._recent),
        )
        self._freshness.save(self._folder)

    def _recent_size(self) -> tuple[int, int]:
        """How many documents are recent, and their bytes."""
        return sum(len(file.documents) for file in self._recent), sum(file.size for file in self._recent)

    def _is_much(self, count: int, size: int, *, times: int = 1) -> bool:
        return count >= times * self._recent_at_most or size >= times * _RECENT_BYTES_AT_MOST

    def _is_commit_due(self) -> bool:
        is_time = time.monotonic() - self._committed_at >= self._commit_every_s
        return is_time or self._is_much(*self._recent_size())

    def _begin_commit(self) -> None:
        """Commit what is recent, in a thread."""
        self._committed_at = time.monotonic()
        if self._open is not None:
            self._open.close()
            self._open = None
        newest: dict[str, Recent] = {}
        for file in self._recent:
            newest.update(file.documents)
        future = self._thread.submit(self._committed.take, newest.values(), is_awaited=False)
        self._committing = future, [*self._recent]

    def _settle(self, *, is_waiting: bool) -> None:
        """Let the files go that a commit has made needless, if it has ended."""
        if self._committing is None or not (is_waiting or self._committing[0].done()):
            return
        (future, needless), self._committing = self._committing, None
        future.result()
        self._recent = [file for file in self._recent if file not in needless]
        # In this order: a reader looks for every file that the record names.
        self._save_record(self._freshness.position, committed_at=self._freshness.committed_at)
        for file in needless:
            file.remove()

    def _versions(self, keys: Sequence[str]) -> dict[str, Version]:
        """The version of each key as of the last write, flushed or not."""
        known: dict[str, Version] = {}
        places = [file.documents for file in self._recent]
        for documents in (*places, self._pending):
            known.update((key, documents[key].version) for key in keys if key in documents)
        return self._committed.versions([key for key in keys if key not in known]) | known

    def _recent_of(self, key: str, document: Document) -> Recent:
        if len(key) > _KEY_BYTES // 4 and len(key.encode()) > _KEY_BYTES:
            raise UnsupportedBodyError(f"a key has more than {_KEY_BYTES} bytes; choose a shorter one in the app")
        body = document.body
        return Recent(
            key=key,
            position=document.version.position.value,
            ordinal=document.version.ordinal,
            popularity=_damped(body, self._spec.popularity),
            body=None if body is None else document_json(body),
        )


def _check_layout(folder: Path, spec: SearchIndex) -> None:
    rebuild = how_to_rebuild(folder)
    try:
        layout = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / TANTIVY_FILE).exists():
            raise IndexLayoutError(
                f"cannot use the search index {str(folder)!r}: it has no {SPEC_FILE!r}; {rebuild}"
            ) from error
        # Written before the index: an index without it is never one of ours that crashed half made.
        replace_text(folder / SPEC_FILE, spec.to_json())
        return
    except json.JSONDecodeError as error:
        raise IndexLayoutError(f"cannot read {str(folder / SPEC_FILE)!r}; {rebuild}") from error
    built = (layout.get("layout"), list(layout.get("text", ())), layout.get("popularity"))
    wanted = (LAYOUT, list(spec.text), spec.popularity)
    if built != wanted:
        raise IndexLayoutError(
            f"cannot use the search index {str(folder)!r}: it was built for (layout, text, popularity) {built!r} and "
            f"the app declares {wanted!r}; {rebuild}"
        )


def _damped(body: Mapping[str, Any] | None, path: str | None) -> float:
    """0 for nothing, 1.5 for a thousand, 3 for a million: the search multiplies a score by log2(2 + this)."""
    values = values_at(body, path) if path else []
    count = next((float(value) for value in values if isinstance(value, (int, float, Decimal))), 0.0)
    return math.log10(1 + count) / 2 if 0 < count < math.inf else 0.0
