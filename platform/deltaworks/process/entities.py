"""The plan that keeps rows: changes fold into rows, and what they touch is processed from its newest state.

    fold ──► due ──► process ──► sinks flush ──► land
                                 │ a thread of its own waits; meanwhile the next fold,
                                 │ and the next process up to its write

An entity that is under way is not processed again before it has landed, so its documents leave in order; one that
changes meanwhile stays due.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.change import ChangeBatch, together
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.log.taken import Taken
from deltaworks.position import Lsn
from deltaworks.process.app import App
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.counting import Counting
from deltaworks.process.flight import Flight
from deltaworks.process.fold import At, Fold, Key, fold_keys, fold_rows, old_row_keys, row_keys
from deltaworks.process.leaving import Leave, Leaving
from deltaworks.process.pace import Pace
from deltaworks.process.pipeline import Outcome, Pipeline
from deltaworks.process.schemas import Schemas
from deltaworks.process.shared.sharing import Sharing
from deltaworks.process.sink import Refusal
from deltaworks.process.sinking import Sinking
from deltaworks.process.source import Table
from deltaworks.process.state import State
from deltaworks.process.waiting import Waiting

ENTITIES_PER_CYCLE = 2_000
"""Enough to fill the batches of an enrichment; few enough that a flush is never far."""
CHANGES_PER_READ = 16_384
CHANGES_PER_FOLD = 262_144
"""What is folded at most before keys are processed; also bounds the transaction."""
_LOOK_AGAIN_S = 0.01
"""How often the log is looked at while there is nothing to do but to wait for a flush."""

logger = structlog.get_logger(__name__)


class Entities:
    """The entities of one app, as its state has them. Serves one thread.

    `on_settled` is called after every landing.
    """

    def __init__(
        self,
        app: App,
        *,
        name: str,
        log: LogReader,
        state: State,
        pipeline: Pipeline,
        sinking: Sinking,
        loop: asyncio.Runner,
        schemas: Schemas,
        counting: Counting,
        sharing: Sharing | None,
        on_settled: Callable[[], None],
    ) -> None:
        self.checkpoint = state.checkpoint()
        """How far the log was taken."""
        self.fold_to = state.plan.fold_to()
        """The group up to which documents had left before rows were kept."""
        self._app = app
        self._name = name
        self._log = log
        self._state = state
        self._pipeline = pipeline
        self._sinking = sinking
        self._loop = loop
        self._schemas = schemas
        self._counting = counting
        self._sharing = sharing
        self._on_settled = on_settled
        self._leaving = Leaving(app, name=name, state=state)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix=f"flush-{name}")
        self._flight: Flight | None = None
        self._pace = Pace()

    @property
    def are_under_way(self) -> bool:
        """Whether sinks flush, or what they answered is not settled yet."""
        return self._flight is not None

    def close(self) -> None:
        """Wait for a flush that is under way; what it made durable is settled in the next life."""
        self._flusher.shutdown()

    def wait_for_turn(self) -> None:
        """While sinks flush, wait until folding is worth its while; see `pace`."""
        flight = self._flight
        if flight is not None and flight.flushing is not None:
            delay_s = self._pace.delay_s(flushing_for_s=time.monotonic() - flight.since)
            if delay_s:
                flight.is_durable(within_s=delay_s)

    def fold(self, up_to_sequence: int) -> bool:
        """Fold the log up to a group into rows, as much as one transaction may hold; whether there was any.

        Raises:
            SchemaMismatchError: a table is not as the app declares it; nothing after it was folded.
        """
        self._pace.begin_work()
        budget = CHANGES_PER_FOLD
        while budget > 0 and self.checkpoint.sequence < up_to_sequence:
            reading = self._log.read(after_sequence=self.checkpoint.sequence, max_changes=CHANGES_PER_READ)
            groups = list(takewhile(lambda group: group.header.sequence <= up_to_sequence, reading))
            self.checkpoint.check_leads_to(groups, app=self._name)
            faults.reach("process.after_read")
            groups = faults.hand_over("process.read", groups)
            if not groups:
                break
            self._schemas.check(groups)
            self._fold_groups(groups)
            budget -= sum(group.header.next_offset - group.header.offset for group in groups)
        return budget < CHANGES_PER_FOLD

    def skip(self, sequence: int, *, keeps_rows: bool) -> None:
        """Take the log up to a group as known: what is due of it never leaves. Without rows it is not read at all."""
        if not keeps_rows:
            header = next(header for header in self._log.headers_backwards() if header.sequence == sequence)
            self.checkpoint = Checkpoint(sequence=sequence, offset=header.next_offset, position=header.position)
            with self._state.folding():
                self._state.save_checkpoint(self.checkpoint)
            return
        while self.checkpoint.sequence < sequence:
            self.fold(sequence)
        with self._state.folding():
            self._state.settle_all()

    def _fold_groups(self, groups: Sequence[StoredGroup]) -> None:
        folds: dict[Table[Any], Fold] = {}
        last = groups[-1].header
        checkpoint = Checkpoint(
            sequence=last.sequence, offset=last.next_offset, position=last.position, reached=self._sinking.reached
        )
        change_count = last.next_offset - groups[0].header.offset
        # Live groups have a row or two for each table; what a batch costs is paid once for all of them.
        read = (batch for group in groups for batch in group.batches if self._schemas.tables_of(batch))
        batches = together(read)
        # Synced while the steps run; nothing leaves before that is done.
        with self._state.settling():
            for batch in batches:
                for table in self._schemas.tables_of(batch):
                    fold = folds.setdefault(table, Fold())
                    self._fold_batch(fold, table, batch, have_left=groups[0].header.sequence <= self.fold_to)
            touched = Fold()
            for table, fold in folds.items():
                if table in self._app.lookups:
                    self._pipeline.drop(table, fold)
                # What an entity used is stored as of its last run, which was before this fold, so no user is missed.
                found = self._state.users(table, fold) if table in self._app.lookups else self._state.apply(table, fold)
                for key, at in found.items():
                    touched.touch(key, at)
            due = self._mark(touched.touched, low=groups[0].header.sequence, high=last.sequence)
            if self._flight is not None:
                self._flight.note(touched.touched)
            self._state.ledger.take(Taken.of(batches, after=self.checkpoint.sequence, up_to=last.sequence))
            self._state.save_checkpoint(checkpoint)
            faults.reach("process.before_fold_commit")
        self._state.sync.begin()
        faults.reach("process.after_fold")
        self.checkpoint = checkpoint
        self._counting.arrivals({key: touched.touched[key] for key in due}, last.appended_at)
        self._counting.changes(change_count)
        self._counting.tally.incomplete += sum(fold.incomplete for fold in folds.values())

    def _mark(self, touched: Mapping[Key, At], *, low: int, high: int) -> Collection[Key]:
        if self._sharing is not None:
            return self._sharing.mark(touched, low=low, high=high)
        self._state.mark(touched)
        return touched.keys()

    def _fold_batch(self, fold: Fold, table: Table[Any], batch: ChangeBatch, *, have_left: bool) -> None:
        if table in self._app.lookups:
            fold_keys(fold, batch)
            return
        keys = {key for key in (*row_keys(batch), *old_row_keys(batch)) if key is not None and key not in fold.puts}
        watched = [step.column for step in self._app.reactions] if table is self._app.entity else []
        fold_rows(
            fold,
            batch,
            table,
            key=table.key or self._app.key,
            stored=self._state.rows.stored(table, keys),
            watched=list(dict.fromkeys(watched)),
            have_left=have_left,
        )

    def due(self) -> list[Waiting]:
        """What to process now; entities whose documents are under way wait until those are durable."""
        under_way = self._flight.keys if self._flight is not None else frozenset()
        waiting = self._state.due(now=time.time(), limit=ENTITIES_PER_CYCLE + len(under_way))
        return [item for item in waiting if item.key not in under_way][:ENTITIES_PER_CYCLE]

    def process(self, waiting: Sequence[Waiting]) -> None:
        """Make the documents of these entities and send them on their way.

        Raises:
            RetryableError: a sink is away; the entities are as due as before.
        """
        outcome = self._loop.run(self._pipeline.run(waiting, self._state.load([item.key for item in waiting])))
        read_to = self.checkpoint.position
        if self._flight is not None and self._flight.touched:
            # What was touched since those left waits for the next cycle; all of it came after they did.
            read_to = self._flight.read_to
        self._pace.end_work()
        self.land()
        if outcome.used or outcome.kept:
            # Before anything more is folded: a change of what was looked up has to find its users.
            with self._state.settling():
                for into, used in outcome.used:
                    self._state.save_used(into, used)
                for into, kept in outcome.kept:
                    self._state.answers.save(into, kept)
        leave = self._leaving.prepare(outcome, waiting)
        if self._sharing is not None:
            self._sharing.check()
        self._state.sync.wait()
        self._sinking.write(leave.outcome)
        # Older changes than the checkpoint may still wait, so sinks hear of it only when none does.
        position = max(read_to, self._sinking.reached) if len(waiting) < ENTITIES_PER_CYCLE else self._sinking.reached
        flushing = self._flusher.submit(self._flush, position) if leave.outcome.documents else None
        self._flight = Flight(
            outcome=outcome, leave=leave, waiting=waiting, position=position, read_to=read_to, flushing=flushing
        )
        if outcome.setbacks or self._app.reactions or self._sharing is not None:
            # A key that is set back holds later changes back, a transition is told of after its document, and a share
            # may leave before the next cycle.
            self.land()

    def _flush(self, position: Lsn) -> list[tuple[str, Sequence[Refusal]]]:
        began = time.monotonic()
        refusals = self._sinking.flush_all(position)
        self._pace.flushed(time.monotonic() - began)
        return refusals

    def land_if_durable(self) -> None:
        """`land` where the sinks have answered, or do in a moment."""
        if self._flight is not None and self._flight.is_durable(within_s=_LOOK_AGAIN_S):
            self.land()

    def land(self) -> bool:
        """Wait until what is under way is durable, and settle it; whether anything was.

        Raises:
            RetryableError: a sink is away; the entities are as due as before.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        outcome, leave = flight.outcome, flight.leave
        refused: frozenset[Key] = frozenset()
        if flight.flushing is not None:
            refusals = flight.flushing.result()
            self._sinking.note(flight.position)
            self._refuse(refusals, outcome, leave, flight.waiting)
            refused = frozenset(each.key for _, listed in refusals for each in listed)
        with self._state.settling():
            self._state.save_reached(self._sinking.reached)
            self._leaving.settle(leave)
            durable = (each for each in leave.outcome.documents if each.key not in refused)
            self._state.ledger.leave(durable, leave.outcome.routes)
            self._state.settle([key for key in leave.settled if key not in flight.touched], outcome.setbacks)
            self._state.mark({key: at for key, at in flight.touched.items() if key in refused})
            faults.reach("process.before_settle_commit")
        faults.reach("process.after_checkpoint")
        self._counting.departures([document.key for document in outcome.documents])
        self._counting.outcome(outcome, len(flight.waiting))
        self._on_settled()
        return True

    def _refuse(
        self,
        refusals: Sequence[tuple[str, Sequence[Refusal]]],
        outcome: Outcome,
        leave: Leave,
        waiting: Sequence[Waiting],
    ) -> None:
        attempts = {item.key: item.attempts for item in waiting}
        for sink, refused in refusals:
            if self._app.windowing is None:
                outcome.refuse(sink, refused, attempts)
                leave.forget({refusal.key for refusal in refused})
                continue
            # A window has no entity that could be held: its next change makes its document again.
            for refusal in refused:
                logger.error("window is refused", app=self._name, sink=sink, error=refusal.reason)
