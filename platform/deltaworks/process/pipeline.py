"""One batch of entities through the steps of an app: rows in, documents and setbacks out.

    gone ─────────────────────────────────────────┐
    entity ─► filters ─► enrichments ─► transforms ┴─► document        raised ─► setback

Knows no log, no state and no sink, so the same code runs live, over a dump, and in a test.
"""

import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from deltaworks import faults
from deltaworks.process import metrics
from deltaworks.process.app import App
from deltaworks.process.arrow import Computed, compute, table_of, table_of_documents
from deltaworks.process.backoff import Backoff
from deltaworks.process.balance import LOST, Balance
from deltaworks.process.clock import SYSTEM, Clock
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY, MAKING, EnrichStep, ProjectStep, Step, TableStep
from deltaworks.process.direct.places import Integers
from deltaworks.process.enriching.changed import Kept, reusable
from deltaworks.process.enriching.enrich import Enriched, Enricher
from deltaworks.process.entity import Entity
from deltaworks.process.fitting import checker
from deltaworks.process.fold import Fold, Key
from deltaworks.process.letters import DeadLetter
from deltaworks.process.lineage import SAMPLES
from deltaworks.process.shape import is_record, to_mapping
from deltaworks.process.sink import Document, Refusal
from deltaworks.process.source import Table
from deltaworks.process.state import Loaded
from deltaworks.process.step import STEP_ERRORS, StepFault, call, fault_of
from deltaworks.process.stuck import Stuck
from deltaworks.process.waiting import Setback, Waiting

_FAILED = object()
"""Stands for the answer of a step that raised."""

_Work = tuple[list[Entity[Any]], list[Any]]
"""The entities that are still on their way, and what stands for each: itself, or its document so far."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a batch came to: every entity is in `documents` or in `setbacks`, never in both.

    `routes` has the sinks that a document is for, where a step chose them; `batch` the documents of a vectorised app.
    """

    # A task that is done shows its result to whoever asks for its text, as `signal.signal` does at every run of a loop.
    documents: list[Document] = field(default_factory=list, repr=False)
    setbacks: list[Setback] = field(default_factory=list, repr=False)
    used: list[tuple[str, dict[Key, frozenset[Key]]]] = field(default_factory=list, repr=False)
    kept: list[tuple[str, dict[Key, Kept | None]]] = field(default_factory=list, repr=False)
    filtered: int = 0
    enriched: int = 0
    routes: dict[Key, frozenset[str]] = field(default_factory=dict, repr=False)
    batch: DocumentBatch | None = field(default=None, repr=False)
    refused_in_batch: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.documents and not self.batch

    def counts(self) -> tuple[int, int]:
        """How many documents there are, and how many entities are gone or filtered out."""
        gone = [document.body for document in self.documents].count(None)
        made = len(self.documents) - gone
        if self.batch is None:
            return made, gone
        return made + self.batch.meta.num_rows - self.refused_in_batch, gone + self.batch.gone.num_rows

    def documents_for(self, sink: str) -> list[Document]:
        """The documents as this sink gets them: one that is for others only is gone here."""
        if not self.routes:
            return self.documents
        return [
            each
            if each.body is None or sink in self.routes.get(each.key, (sink,))
            else msgspec.structs.replace(each, body=None)
            for each in self.documents
        ]

    def refuse(self, sink: str, refusals: Sequence[Refusal], attempts: Mapping[Key, int]) -> None:
        """Make documents that a sink will never take dead letters of their entities; the others stand as they are."""
        refused = {refusal.key: refusal for refusal in refusals}
        dead = [document.key for document in self.documents if document.key in refused]
        if self.batch is not None:
            in_batch = [key for key in self.batch.meta.column(KEY).to_pylist() if key in refused]
            self.refused_in_batch += len(in_batch)
            dead += in_batch
        self.documents = [document for document in self.documents if document.key not in refused]
        self.setbacks += [
            Setback(key=key, step=sink, error=refused[key].reason, attempts=attempts.get(key, 0) + 1, next_try=None)
            for key in dead
        ]


class Pipeline:
    """The steps of an app, ready to run; `clients` are open."""

    def __init__(self, app: App, *, name: str, clients: Mapping[str, Any], clock: Clock = SYSTEM) -> None:
        self._app = app
        self._name = name
        self._clients = clients
        self._faults = {id(step): _document_checker(step) for step in app.making}
        self._are_records = {step: check is not _mapping_fault for step, check in self._faults.items()}
        self._sinks = frozenset(sink.name for sink in app.sinks)
        self._clock = clock
        self._places = {step.name: step.place for step in app.steps}
        self.enrichers = {step.into: Enricher(step, app=name, clients=clients, clock=clock) for step in app.enrichments}
        self.stuck: Stuck | None = None
        """A change that ended the process before; its step is not tried on it again."""
        self.samples: deque[Entity[Any]] = deque(maxlen=SAMPLES)
        """The entities that came last to the making of documents, with what enrichments found; for `lineage`."""

    async def run(self, waiting: Sequence[Waiting], loaded: Mapping[Key, Loaded]) -> Outcome:
        """Take each entity through the steps; nothing a step does reaches another entity."""
        gone: list[Document] = []
        entities: list[Entity[Any]] = []
        for item in waiting:
            rows = loaded[item.key]
            if rows.after is None:
                gone.append(_gone(item))
            else:
                entities.append(
                    Entity(
                        key=item.key,
                        after=rows.after,
                        version=item.version,
                        committed_at=item.committed_at,
                        related=rows.related,
                    )
                )
        attempts = {item.key: item.attempts for item in waiting if item.attempts}
        return await self.run_entities(entities, gone=gone, attempts=attempts, loaded=loaded)

    async def run_entities(
        self,
        entities: list[Entity[Any]],
        *,
        gone: list[Document],
        attempts: Mapping[Key, int] | None = None,
        loaded: Mapping[Key, Loaded] | None = None,
    ) -> Outcome:
        """Take entities that are there through the steps; `gone` has tombstones of those that are not."""
        run = _Run(
            attempts=attempts or {},
            loaded=loaded or {},
            clock=self._clock,
            places=self._places,
            outcome=Outcome(documents=list(gone)),
        )
        whole = Balance(entities, run.outcome)
        # Before the first step that makes a document, an entity stands for itself.
        values: list[Any] = entities
        is_made = False
        for step in self._app.steps:
            makes_first = not is_made and not isinstance(step, EnrichStep) and step.kind in MAKING
            given, balance = entities, Balance(entities, run.outcome)
            with metrics.STEP_SECONDS.labels(self._name, step.name).time():
                entities, values = faults.hand_over("process.step", await self._take(step, entities, values, run))
            if makes_first:
                is_made = True
                self.sample(given, run.outcome)
            if not balance.is_even(entities, run.outcome):
                self._hold(balance.lost(entities, run.outcome), step, run)
        if not is_made:
            self.samples.extend(entities)
            values = [entity.after for entity in entities]
        run.outcome.documents += _documents(entities, values)
        if self._app.steps and not whole.is_kept(run.outcome):
            self._hold(whole.lost((), run.outcome), self._app.steps[-1], run)
        return run.outcome

    def _hold(self, lost: Sequence[Key], step: Step, run: "_Run") -> None:
        for key in lost:
            metrics.LOST.labels(self._name, step.name).inc()
            run.set_back(key, StepFault(step=step.name, error=LOST, may_pass=True))

    def sample(self, given: Sequence[Entity[Any]], outcome: Outcome) -> None:
        """Keep the last of those that a step makes documents of, but for those it failed on: it would again."""
        failed = {setback.key for setback in outcome.setbacks}
        self.samples.extend(entity for entity in given[-SAMPLES:] if entity.key not in failed)

    def drop(self, table: Table[Any], fold: Fold) -> None:
        """Forget what is kept of the changed rows of a looked-up table."""
        for enricher in self.enrichers.values():
            if enricher.step.lookup is table:
                if fold.emptied_at is not None:
                    enricher.drop_all()
                enricher.drop(fold.touched)

    def drop_all(self) -> None:
        """Forget every kept answer."""
        for enricher in self.enrichers.values():
            enricher.drop_all()

    def run_table(self, rows: pa.Table) -> tuple[Outcome, Computed]:
        """Take a table of entities through the steps of an app that has no others than those over tables.

        The outcome has the setbacks; documents are the rows of what was computed, and keys in neither are filtered out.
        """
        made_of: Integers | None = np.arange(rows.num_rows)
        run = _Run(attempts={}, loaded={}, clock=self._clock, places=self._places)
        for step in self._app.steps:
            before = rows.num_rows
            if isinstance(step, ProjectStep):
                rows = rows.select([KEY, *step.fields.values()]).rename_columns([KEY, *step.fields])
                setbacks: Sequence[Setback] = ()
            else:
                assert isinstance(step, TableStep)  # noqa: S101 - told by the caller
                computed = compute(step, rows, self._clients)
                for key, fault in computed.faults.items():
                    run.set_back(key, fault)
                made_of = None if made_of is None or computed.places is None else made_of[computed.places]
                rows, setbacks = (
                    computed.rows,
                    run.outcome.setbacks[-len(computed.faults) or len(run.outcome.setbacks) :],
                )
            filtered = before - rows.num_rows - len(setbacks)
            self._count(step, taken=before, out=rows.num_rows, filtered=filtered, setbacks=setbacks)
        return run.outcome, Computed(rows=rows, places=made_of)

    async def _take(
        self, step: Step | EnrichStep | TableStep, entities: list[Entity[Any]], values: list[Any], run: "_Run"
    ) -> "_Work":
        if isinstance(step, EnrichStep):
            entities = await self._enrich(step, entities, run)
            return entities, entities
        if isinstance(step, TableStep):
            return self._compute(step, entities, values, run)
        if step.kind == "filter":
            return await self._filter(step, entities, values, run)
        if step.kind in MAKING:
            return await self._make(step, entities, values, run)
        if step.kind == "route":
            return await self._route(step, entities, values, run)
        return entities, values

    async def _filter(self, step: Step, entities: list[Entity[Any]], values: list[Any], run: "_Run") -> "_Work":
        before = len(run.outcome.setbacks)
        answers = await self._call_each(step, entities, values, run)
        setbacks = run.outcome.setbacks[before:]
        if setbacks:
            entities, values, answers = _answered(entities, values, answers)
        kept = list(compress(entities, answers))
        kept_values = kept if values is entities else list(compress(values, answers))
        dropped = list(compress(entities, map(not_, answers)))
        run.outcome.documents += [Document(each.key, each.version, each.committed_at, None) for each in dropped]
        run.outcome.filtered += len(dropped)
        self._count(step, taken=len(answers) + len(setbacks), out=len(kept), filtered=len(dropped), setbacks=setbacks)
        return kept, kept_values

    async def _enrich(self, step: EnrichStep, entities: list[Entity[Any]], run: "_Run") -> list[Entity[Any]]:
        before = len(run.outcome.setbacks)
        left = [document.key for document in run.outcome.documents]
        suspects = frozenset(key for key, attempts in run.attempts.items() if attempts)
        reused: dict[Key, Any] = {}
        to_ask = entities
        if step.when is not None:
            reused, to_ask = reusable(step.when, entities, run.kept(step.into))
        answer = await self.enrichers[step.into].enrich(to_ask, suspects=suspects)
        if step.when is not None:
            run.outcome.kept.append((step.into, dict.fromkeys(left) | _kept(step, to_ask, answer)))
        for key, fault in answer.faults.items():
            run.set_back(key, fault, step.retry, step.on_fail)
        if step.lookup is not None:
            # Those that failed are remembered too: a change of what they looked up may be the mend.
            none: frozenset[Key] = frozenset()
            run.outcome.used.append((step.into, dict.fromkeys(left, none) | answer.used))
        run.outcome.enriched += answer.id_count
        found = reused | answer.values
        done = [_with_answer(entity, step.into, found[entity.key]) for entity in entities if entity.key in found]
        self._count(step, taken=len(entities), out=len(done), setbacks=run.outcome.setbacks[before:])
        return done

    async def _make(self, step: Step, entities: list[Entity[Any]], values: list[Any], run: "_Run") -> "_Work":
        before, taken = len(run.outcome.setbacks), len(entities)
        bodies = await self._call_each(step, entities, values, run)
        if len(run.outcome.setbacks) > before:
            entities, _, bodies = _answered(entities, values, bodies)
        if self._are_records[id(step)] or any(kind is not dict for kind in set(map(type, bodies))):
            entities, bodies = self._checked(step, entities, bodies, run)
        self._count(step, taken=taken, out=len(entities), setbacks=run.outcome.setbacks[before:])
        return entities, bodies

    def _checked(self, step: Step, entities: list[Entity[Any]], bodies: list[Any], run: "_Run") -> "_Work":
        """Those whose document is as the step declares it; the others are set back."""
        faults = list(map(self._faults[id(step)], bodies))
        if faults.count(None) == len(faults):
            return entities, bodies
        for entity, fault in zip(entities, faults, strict=True):
            if fault is not None:
                text = f"returned a document that is not as declared, {fault} ({step.place})"
                run.set_back(entity.key, StepFault(step=step.name, error=text, may_pass=False))
        is_good = [fault is None for fault in faults]
        return list(compress(entities, is_good)), list(compress(bodies, is_good))

    def _compute(self, step: TableStep, entities: list[Entity[Any]], values: list[Any], run: "_Run") -> "_Work":
        if not entities:
            return [], []
        before = len(run.outcome.setbacks)
        keys = [entity.key for entity in entities]
        if isinstance(values[0], Entity):
            rows = table_of(keys, [entity.after for entity in entities], self._app.entity.fields)
        else:
            rows = table_of_documents(keys, [to_mapping(value) for value in values])
        computed = compute(step, rows, self._clients)
        for key, fault in computed.faults.items():
            run.set_back(key, fault)
        made_keys = computed.rows.column(KEY).to_pylist()
        bodies = dict(zip(made_keys, computed.rows.drop_columns([KEY]).to_pylist(), strict=True))
        kept = [entity for entity in entities if entity.key in bodies]
        dropped = [_gone(each) for each in entities if each.key not in bodies and each.key not in computed.faults]
        run.outcome.documents += dropped
        run.outcome.filtered += len(dropped)
        setbacks = run.outcome.setbacks[before:]
        self._count(step, taken=len(entities), out=len(kept), filtered=len(dropped), setbacks=setbacks)
        return kept, [bodies[entity.key] for entity in kept]

    async def _route(self, step: Step, entities: list[Entity[Any]], values: list[Any], run: "_Run") -> "_Work":
        kept, kept_values = [], []
        answers = await self._call_each(step, entities, values, run)
        for entity, value, answer in zip(entities, values, answers, strict=True):
            if answer is _FAILED:
                continue
            chosen = frozenset([answer] if isinstance(answer, str) else answer or ())
            if chosen - self._sinks:
                text = f"returned a name of no sink; known: {', '.join(sorted(self._sinks))} ({step.place})"
                run.set_back(entity.key, StepFault(step=step.name, error=text, may_pass=False))
                continue
            run.outcome.routes[entity.key] = chosen
            kept.append(entity)
            kept_values.append(value)
        return kept, kept_values

    async def _call_each(
        self, step: Step, entities: Sequence[Entity[Any]], values: Sequence[Any], run: "_Run"
    ) -> list[Any]:
        """What the step says of each value, `_FAILED` where it raised."""
        is_plain = not (step.is_async or step.clients)
        if is_plain and (self.stuck is None or self.stuck.step != step.name):
            return self._answers(step, entities, values, run)
        answers: list[Any] = []
        for entity, value in zip(entities, values, strict=True):
            if self.stuck is not None and self.stuck.is_of(step.name, entity.key, entity.version):
                run.set_back(entity.key, StepFault(step=step.name, error=self.stuck.error, may_pass=False))
                answers.append(_FAILED)
                continue
            try:
                answers.append(await call(step, value, self._clients))
            except STEP_ERRORS as error:
                run.set_back(entity.key, fault_of(step, error))
                answers.append(_FAILED)
        return answers

    def _answers(self, step: Step, entities: Sequence[Entity[Any]], values: Sequence[Any], run: "_Run") -> list[Any]:
        """The same of a plain function, as fast as Python calls one."""
        answers: list[Any] = []
        calls = map(step.function, values)
        while len(answers) < len(values):
            try:
                # Keeps what it has when a call raises, and goes on behind that one.
                answers.extend(calls)
                if len(answers) < len(values):
                    raise RuntimeError("the step raised StopIteration, which ends whoever calls it in a row")
            except STEP_ERRORS as error:
                run.set_back(entities[len(answers)].key, fault_of(step, error))
                answers.append(_FAILED)
        return answers

    def _count(self, step: Step, *, taken: int, out: int, setbacks: Sequence[Setback], filtered: int = 0) -> None:
        failed = sum(setback.next_try is None for setback in setbacks)
        retried = len(setbacks) - failed
        metrics.count_step(
            self._name, step.name, taken=taken, out=out, filtered=filtered, retried=retried, failed=failed
        )


@dataclass(slots=True, kw_only=True)
class _Run:
    attempts: Mapping[Key, int]
    loaded: Mapping[Key, Loaded]
    clock: Clock
    places: Mapping[str, str]
    outcome: Outcome = field(default_factory=Outcome)

    def kept(self, into: str) -> dict[Key, Kept]:
        """The earlier answers of an enrichment."""
        return {key: rows.kept[into] for key, rows in self.loaded.items() if into in rows.kept}

    def set_back(
        self, key: Key, fault: StepFault, retry: Backoff | None = None, on_fail: DeadLetter | None = None
    ) -> None:
        attempts = self.attempts.get(key, 0) + fault.was_tried
        next_try = next_try_after(fault, attempts=attempts, retry=retry or Backoff(), now=self.clock.time())
        self.outcome.setbacks.append(
            Setback(
                key=key,
                step=fault.step,
                error=fault.error,
                attempts=attempts,
                next_try=next_try,
                place=self.places.get(fault.step),
                holds_key=None if on_fail is None else on_fail.hold_key,
            )
        )


def next_try_after(fault: StepFault, *, attempts: int, retry: Backoff, now: float | None = None) -> float | None:
    """When to try again after failed try `attempts`, in seconds since 1970; `None` for never.

    What was not tried at all is tried again whatever the attempts.
    """
    is_spent = retry.attempts is not None and attempts >= retry.attempts and fault.was_tried
    if not fault.may_pass or is_spent:
        return None
    delay_s = retry.delay_s(max(attempts, 1))
    return (SYSTEM.time() if now is None else now) + (delay_s if fault.after_s is None else max(fault.after_s, delay_s))


def _kept(step: EnrichStep, asked: Sequence[Entity[Any]], answer: Enriched) -> dict[Key, Kept | None]:
    """The answers to keep. One that cannot be kept as it is becomes a fault of its entity."""
    kept: dict[Key, Kept | None] = {}
    for entity in asked:
        if step.when is None or entity.key not in answer.values:
            continue
        kept[entity.key] = Kept.of(step.when.basis(entity), answer.values[entity.key])
        if kept[entity.key] is None:
            del answer.values[entity.key]
            text = f"returned what JSON cannot hold, so when=changed(…) cannot keep it ({step.place})"
            answer.faults[entity.key] = StepFault(step=step.name, error=text, may_pass=False)
    return kept


def _with_answer(entity: Entity[Any], into: str, answer: Any) -> Entity[Any]:
    # `replace` takes five times as long, for every entity.
    return Entity(
        key=entity.key,
        after=entity.after,
        version=entity.version,
        committed_at=entity.committed_at,
        related=entity.related,
        enriched={**entity.enriched, into: answer},
    )


def _gone(item: Waiting | Entity[Any]) -> Document:
    return Document(key=item.key, version=item.version, committed_at=item.committed_at, body=None)


def _documents(entities: Sequence[Entity[Any]], bodies: Sequence[Any]) -> list[Document]:
    if any(kind is not dict for kind in set(map(type, bodies))):
        bodies = list(map(to_mapping, bodies))
    # Column by column, which takes two thirds of the time of a call for each.
    keys, versions = [each.key for each in entities], [each.version for each in entities]
    return list(map(Document, keys, versions, [each.committed_at for each in entities], bodies))


def _answered(
    entities: Sequence[Entity[Any]], values: Sequence[Any], answers: Sequence[Any]
) -> tuple[list[Entity[Any]], list[Any], list[Any]]:
    """Without those whose step raised."""
    has = [answer is not _FAILED for answer in answers]
    return list(compress(entities, has)), list(compress(values, has)), list(compress(answers, has))


def _document_checker(step: Step) -> Callable[[Any], str | None]:
    """What looks for faults in what a step made: against its return type, if it declares one."""
    declared = typing.get_type_hints(step.function).get("return") if step.kind == "transform" else None
    if is_record(declared):
        return checker(declared)
    return _mapping_fault


def _mapping_fault(body: Any) -> str | None:
    if type(body) is dict or isinstance(body, Mapping) or is_record(type(body)):
        return None
    return f"expected a mapping, got {type(body).__name__}"
