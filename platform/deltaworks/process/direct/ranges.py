"""Runs an app by the direct plan, range after range; see `direct`.

read ──► reduce ──► begin ──► steps ──► write ──► flush ──► settle
   │                synced meanwhile:                       not synced: checkpoint, rows of keys set back
   │                how far the range goes                  │
   └──► the proof of what was taken, beside all this ───────┘
"""

import asyncio
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks import faults
from deltaworks.change import DELETE, READ, ChangeBatch, op_letters
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.log.taken import Taken
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.columns import BatchSink
from deltaworks.process.declared import KEY
from deltaworks.process.direct.flags import Flags, flag_array
from deltaworks.process.direct.reducer import Reduced, Reducer, document_batch, is_vectorised
from deltaworks.process.entity import Entity
from deltaworks.process.fold import Fold, Key, Row, moment
from deltaworks.process.ledger.left import run_of_documents, run_of_rows
from deltaworks.process.lineage import SAMPLES
from deltaworks.process.pipeline import Outcome, Pipeline
from deltaworks.process.sink import Document, Refusal, Sink
from deltaworks.process.state import State
from deltaworks.process.waiting import Standing

CHANGES_PER_RANGE = 32_768
"""What becomes Python objects at once: few enough for the caches of a processor."""
CHANGES_PER_TABLE = 262_144
"""What stays in columns at once."""
_LAGS_PER_RANGE = 50
"""A sample: to observe one takes longer than to process a change."""

Flush = Callable[[Lsn], Sequence[tuple[str, Sequence[Refusal]]]]


@dataclass(slots=True, kw_only=True)
class Ranged:
    """A range that is done; of some of its streamed changes, when they were committed and appended, since 1970."""

    checkpoint: Checkpoint
    outcome: Outcome
    change_count: int
    entity_count: int = 0
    appended_at: Sequence[float] = ()
    committed_at: Sequence[float] = ()
    judged: pa.Table | None = None
    """Of an app that takes tables: the rows that its steps did not fail on."""
    is_made: Flags = field(default_factory=lambda: np.empty(0, bool))
    """Which of them became documents."""
    gone_keys: frozenset[Key] = frozenset()
    """Keys of rows that are not there any more: of documents that are objects."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for cycles among a range's objects, again and again while it makes them.

    They are freed by their counts; looking took more than half of the time of a row.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Ranges:
    """The direct plan of one app."""

    def __init__(
        self,
        app: App,
        *,
        log: LogReader,
        state: State,
        pipeline: Pipeline,
        sinks: Sequence[Sink],
        loop: asyncio.Runner,
        check: Callable[[Sequence[StoredGroup]], None],
        flush: Flush,
    ) -> None:
        self._app = app
        self._log = log
        self._state = state
        self._pipeline = pipeline
        self._sinks = sinks
        self._loop = loop
        self._check = check
        self._flush = flush
        self._reducer = Reducer(app)
        self._is_vectorised = is_vectorised(app)
        self._has_rows = state.rows.has_any(app.entity)
        self._proving = ThreadPoolExecutor(1, thread_name_prefix="proof")

    def close(self) -> None:
        """Let go of the thread; a second call does nothing."""
        self._proving.shutdown()

    def run(self, checkpoint: Checkpoint, *, up_to_sequence: int) -> Ranged | None:
        """Take the next range through; `None` where there is none.

        Raises:
            RowsNeededError: nothing of the range was written; it has to be folded into rows.
        """
        groups = faults.hand_over("process.read", self._read(checkpoint, up_to_sequence))
        faults.reach("process.after_read")
        if not groups:
            return None
        self._check(groups)
        last = groups[-1].header
        done = replace(checkpoint, sequence=last.sequence, offset=last.next_offset, position=last.position)
        batches = self._reducer.batches(groups)
        change_count = last.next_offset - groups[0].header.offset
        if not batches:
            # A checkpoint without rows may be lost: the same groups would come to nothing again.
            with self._state.settling():
                self._state.ledger.take(Taken(after=checkpoint.sequence, up_to=last.sequence))
                self._state.save_checkpoint(done)
            return Ranged(checkpoint=done, outcome=Outcome(), change_count=change_count)
        taken = self._taken(batches, after=checkpoint.sequence, up_to=last.sequence)
        standing = self._state.standing_keys()
        held = self._state.waiting_keys() if standing else set()
        reduced = self._reducer.reduce(groups, batches, stored=self._stored, apart=held)
        # Synced while the steps run; nothing leaves before that is done.
        with self._state.settling():
            self._state.plan.begin(last.sequence)
            faults.reach("process.before_fold_commit")
        self._state.sync.begin()
        faults.reach("process.after_fold")
        take = self._table_range if self._is_vectorised else self._row_range
        with _no_collection():
            ranged = take(reduced, held)
        ranged.checkpoint, ranged.change_count = done, change_count
        if not ranged.outcome.is_empty:
            for name, refused in self._flush(last.position):
                ranged.outcome.refuse(name, refused, {})
            ranged.checkpoint = replace(done, reached=last.position)
        with self._state.settling():
            self._keep(reduced, ranged.outcome, held)
            self._state.settle(self._settled(reduced, ranged.outcome, standing, held), ranged.outcome.setbacks)
            self._state.ledger.leave_runs(_left(ranged, reduced))
            self._state.ledger.take(taken())
            self._state.save_checkpoint(ranged.checkpoint)
            faults.reach("process.before_settle_commit")
        faults.reach("process.after_checkpoint")
        return ranged

    def _taken(self, batches: Sequence[ChangeBatch], *, after: int, up_to: int) -> Callable[[], Taken]:
        """The proof of a range; a large one is made beside its steps, if those leave Python's lock to others too."""
        if not self._is_vectorised or sum(len(batch) for batch in batches) < CHANGES_PER_RANGE:
            return lambda: Taken.of(batches, after=after, up_to=up_to)
        return self._proving.submit(Taken.of, batches, after=after, up_to=up_to).result

    def _read(self, checkpoint: Checkpoint, up_to_sequence: int) -> list[StoredGroup]:
        begun = self._state.plan.reading_to()
        limit: int | None = CHANGES_PER_TABLE if self._is_vectorised else CHANGES_PER_RANGE
        if begun > checkpoint.sequence:
            # Documents of this range may be in the sinks, so it is taken as it was.
            up_to_sequence, limit = begun, None
        reading = self._log.read(after_sequence=checkpoint.sequence, max_changes=limit)
        groups = list(takewhile(lambda group: group.header.sequence <= up_to_sequence, reading))
        checkpoint.check_leads_to(groups, app=self._app.name)
        return groups

    def _row_range(self, reduced: Reduced, held: set[Key]) -> Ranged:
        entities, gone = self._reducer.entities(reduced.rows)
        more, more_gone = self._folded(reduced.folded, held)
        outcome = self._loop.run(self._pipeline.run_entities([*entities, *more], gone=[*gone, *more_gone]))
        self._state.sync.wait()
        self._write(outcome)
        ranged = self._ranged(reduced, outcome, entity_count=len(entities) + len(gone) + len(more) + len(more_gone))
        ranged.gone_keys = frozenset(each.key for each in (*gone, *more_gone))
        return ranged

    def _table_range(self, reduced: Reduced, held: set[Key]) -> Ranged:
        rows = reduced.rows
        is_live = op_letters(rows.column("_op")) != ord(DELETE)
        live = rows if is_live.all() else rows.filter(flag_array(is_live))
        outcome, computed = self._pipeline.run_table(self._reducer.table(live))
        if len(self._pipeline.samples) < SAMPLES:
            self._pipeline.sample(self._reducer.entities(live.slice(0, SAMPLES))[0], outcome)
        judged, places = rows, computed.places
        if places is not None and live is not rows:
            places = np.flatnonzero(is_live)[places]
        if outcome.setbacks:
            failed = pa.array([setback.key for setback in outcome.setbacks], rows.column(KEY).type)
            judged = rows.filter(pc.invert(pc.is_in(rows.column(KEY), failed)))
            places = None
        batch, is_made = document_batch(judged, computed.rows, places)
        handed = faults.hand_over("process.write_batch", batch)
        self._state.sync.wait()
        one_by_one: list[Document] | None = None
        for sink in self._sinks:
            faults.reach("process.before_write")
            if isinstance(sink, BatchSink):
                sink.write_batch(handed)
            elif len(handed):
                one_by_one = handed.documents() if one_by_one is None else one_by_one
                sink.write(one_by_one)
            faults.reach("process.after_write")
        folded, folded_gone = self._folded(reduced.folded, held)
        rest = Outcome()
        if folded or folded_gone:
            rest = self._loop.run(self._pipeline.run_entities(folded, gone=folded_gone))
            self._write(rest)
        outcome.setbacks += rest.setbacks
        outcome.filtered += batch.gone.num_rows - (rows.num_rows - live.num_rows) + rest.filtered
        outcome.documents, outcome.batch = rest.documents, batch
        ranged = self._ranged(reduced, outcome, entity_count=rows.num_rows + len(folded) + len(folded_gone))
        ranged.judged, ranged.is_made = judged, is_made
        ranged.gone_keys = frozenset(each.key for each in folded_gone)
        return ranged

    def _write(self, outcome: Outcome) -> None:
        for spec, sink in zip(self._app.sinks, self._sinks, strict=True):
            faults.reach("process.before_write")
            if outcome.documents:
                sink.write(faults.hand_over("process.write", outcome.documents_for(spec.name)))
            faults.reach("process.after_write")

    def _folded(self, fold: Fold, held: set[Key]) -> tuple[list[Entity[Any]], list[Document]]:
        """What was put together row by row, but for the held, which wait in the state."""
        entities: list[Entity[Any]] = []
        gone: list[Document] = []
        for key, row in fold.puts.items():
            if key in held or key not in fold.touched:
                continue
            at = fold.touched[key]
            version, committed_at = Version(Lsn(at.position), at.ordinal), moment(at.committed_at)
            if row is None:
                gone.append(Document(key=key, version=version, committed_at=committed_at, body=None))
                continue
            after = self._state.rows.read(self._app.entity, row[1:])
            entities.append(Entity(key=key, after=after, version=version, committed_at=committed_at, related={}))
        return entities, gone

    def _keep(self, reduced: Reduced, outcome: Outcome, held: set[Key]) -> None:
        """Store the rows that have to stay, drop those that need not any more; inside `settling`."""
        set_back = {setback.key for setback in outcome.setbacks}
        kept = reduced.wide | set_back | held
        fold = self._reducer.fold(reduced.batches, kept - reduced.folded.puts.keys(), stored=self._stored)
        puts = {**fold.puts, **{key: row for key, row in reduced.folded.puts.items() if key in kept}}
        if self._has_rows:
            self._state.rows.put(self._app.entity, dict.fromkeys([k for k in reduced.all_keys() if k not in kept]))
        if puts:
            self._state.rows.put(self._app.entity, puts)
            self._has_rows = True
        touched = {key: at for key, at in reduced.folded.touched.items() if key in set_back or key in held}
        if set_back:
            # Also where the row is as it was: what was tried has to be tried again.
            failed = pa.array(list(set_back), reduced.rows.column(KEY).type)
            touched |= self._reducer.ats(reduced.rows.filter(pc.is_in(reduced.rows.column(KEY), failed)))
        self._state.mark(touched)

    def _settled(
        self, reduced: Reduced, outcome: Outcome, standing: Mapping[Key, Standing], held: set[Key]
    ) -> Iterator[Key]:
        """The keys that the state knows and that are well now; most are not known at all."""
        set_back = {setback.key for setback in outcome.setbacks}
        taken = set(reduced.all_keys()) if standing.keys() - held else set()
        return (key for key in standing if key in taken and key not in held and key not in set_back)

    def _stored(self, keys: Sequence[Key]) -> Mapping[Key, Row]:
        return self._state.rows.stored(self._app.entity, keys) if self._has_rows else {}

    def _ranged(self, reduced: Reduced, outcome: Outcome, *, entity_count: int) -> Ranged:
        streamed = np.flatnonzero(op_letters(reduced.rows.column("_op")) != ord(READ))
        some = streamed[:: -(-len(streamed) // _LAGS_PER_RANGE) or 1]
        committed_at = reduced.rows.column("_committed_at").take(pa.array(some)).cast(pa.int64()).to_numpy()
        return Ranged(
            checkpoint=Checkpoint(),
            outcome=outcome,
            change_count=0,
            entity_count=entity_count,
            appended_at=reduced.appended_at[some].tolist(),
            committed_at=(committed_at / 1e6).tolist(),
        )


def _left(ranged: Ranged, reduced: Reduced) -> list[pa.Table]:
    """What every sink has of a range, for the ledger."""
    outcome, documents = ranged.outcome, ranged.outcome.documents
    runs: list[pa.Table] = []
    if ranged.judged is not None or not outcome.routes:
        rows, is_made = ranged.judged, ranged.is_made
        if rows is None:
            rows = reduced.rows
            is_made = ~_are_among(rows, [each.key for each in documents if each.body is None])
        if outcome.setbacks:
            is_left = ~_are_among(rows, [setback.key for setback in outcome.setbacks])
            rows, is_made = rows.filter(flag_array(is_left)), is_made[is_left]
        runs.append(run_of_rows(rows, is_made=is_made, is_gone=op_letters(rows.column("_op")) == ord(DELETE)))
        documents = [each for each in documents if each.key in reduced.folded.puts] if reduced.folded.puts else []
    if documents:
        runs.append(run_of_documents(documents, outcome.routes, gone=ranged.gone_keys))
    return runs


def _are_among(rows: pa.Table, some: Sequence[Key]) -> Flags:
    if not some:
        return np.zeros(rows.num_rows, bool)
    keys = rows.column(KEY)
    return np.asarray(pc.is_in(keys, pa.array(some, keys.type)).to_numpy(), bool)
