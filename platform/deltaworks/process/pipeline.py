"""One batch of entities through the steps of an app: rows in, documents and setbacks out.

    gone ─────────────────────────────────────────┐
    entity ─► filters ─► enrichments ─► transform ─┴─► document        raised ─► setback

Knows no log, no state and no sink, so the same code runs live, over a dump, and in a test.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltaworks.process import metrics
from deltaworks.process.app import App, Backoff, EnrichStep, Step
from deltaworks.process.enrich import enrich
from deltaworks.process.entity import Entity
from deltaworks.process.fold import Key
from deltaworks.process.lineage import SAMPLES
from deltaworks.process.shape import checker, to_mapping
from deltaworks.process.sink import Document
from deltaworks.process.state import Loaded, Setback, Waiting
from deltaworks.process.step import StepFault, call, fault_of


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a batch came to: every entity is in `documents` or in `setbacks`, never in both."""

    documents: list[Document] = field(default_factory=list)
    setbacks: list[Setback] = field(default_factory=list)
    used: list[tuple[str, dict[Key, frozenset[Key]]]] = field(default_factory=list)
    filtered: int = 0
    enriched: int = 0


class Pipeline:
    """The steps of an app, ready to run; `clients` are open."""

    def __init__(self, app: App, *, name: str, clients: Mapping[str, Any]) -> None:
        self._app = app
        self._name = name
        self._clients = clients
        document_type = app.document_type()
        self._document_fault = None if document_type is None else checker(document_type)
        self.samples: deque[Entity[Any]] = deque(maxlen=SAMPLES)
        """The entities that came last to the transform step, with what enrichments found; for `lineage`."""

    async def run(self, waiting: Sequence[Waiting], loaded: Mapping[Key, Loaded]) -> Outcome:
        """Take each entity through the steps; nothing a step does reaches another entity."""
        run = _Run(attempts={item.key: item.attempts for item in waiting})
        entities: list[Entity[Any]] = []
        for item in waiting:
            rows = loaded[item.key]
            if rows.after is None:
                run.outcome.documents.append(_gone(item))
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
        for step in self._app.filters:
            entities = await self._filter(step, entities, run)
        for enrichment in self._app.enrichments:
            entities = await self._enrich(enrichment, entities, run)
        await self._transform(entities, run)
        return run.outcome

    async def _filter(self, step: Step, entities: list[Entity[Any]], run: "_Run") -> list[Entity[Any]]:
        kept = []
        before = len(run.outcome.setbacks)
        dropped = 0
        for entity in entities:
            try:
                is_kept = await call(step, entity, self._clients)
            except Exception as error:  # A step may raise anything; it is judged and kept with its key.
                run.set_back(entity.key, fault_of(step, error))
                continue
            if is_kept:
                kept.append(entity)
            else:
                dropped += 1
                run.outcome.documents.append(_gone(entity))
        run.outcome.filtered += dropped
        self._count(step, taken=len(entities), out=len(kept), filtered=dropped, setbacks=run.outcome.setbacks[before:])
        return kept

    async def _enrich(self, step: EnrichStep, entities: list[Entity[Any]], run: "_Run") -> list[Entity[Any]]:
        before = len(run.outcome.setbacks)
        suspects = frozenset(key for key, attempts in run.attempts.items() if attempts)
        answer = await enrich(step, entities, suspects=suspects, clients=self._clients)
        for key, fault in answer.faults.items():
            run.set_back(key, fault, step.retry)
        if step.lookup is not None:
            # Those that failed are remembered too: a change of what they looked up may be the mend.
            none: frozenset[Key] = frozenset()
            nothing = {document.key: none for document in run.outcome.documents}
            run.outcome.used.append((step.into, nothing | answer.used))
        run.outcome.enriched += answer.id_count
        done = [
            replace(entity, enriched={**entity.enriched, step.into: answer.values[entity.key]})
            for entity in entities
            if entity.key in answer.values
        ]
        self._count(step, taken=len(entities), out=len(done), setbacks=run.outcome.setbacks[before:])
        return done

    async def _transform(self, entities: list[Entity[Any]], run: "_Run") -> None:
        step = self._app.transformation
        before = len(run.outcome.setbacks)
        self.samples.extend(entities)
        for entity in entities:
            if step is None:
                run.outcome.documents.append(_document(entity, entity.after))
                continue
            try:
                body = await call(step, entity, self._clients)
            except Exception as error:  # A step may raise anything; it is judged and kept with its key.
                run.set_back(entity.key, fault_of(step, error))
                continue
            fault = self._fault(body)
            if fault is not None:
                text = f"returned a document that is not as declared, {fault} ({step.place})"
                run.set_back(entity.key, StepFault(step=step.name, error=text, may_pass=False))
                continue
            run.outcome.documents.append(_document(entity, body))
        if step is not None:
            setbacks = run.outcome.setbacks[before:]
            self._count(step, taken=len(entities), out=len(entities) - len(setbacks), setbacks=setbacks)

    def _fault(self, body: Any) -> str | None:
        if self._document_fault is not None:
            return self._document_fault(body)
        return None if isinstance(body, Mapping) else f"expected a mapping, got {type(body).__name__}"

    def _count(self, step: Step, *, taken: int, out: int, setbacks: Sequence[Setback], filtered: int = 0) -> None:
        failed = sum(setback.next_try is None for setback in setbacks)
        retried = len(setbacks) - failed
        metrics.count_step(
            self._name, step.name, taken=taken, out=out, filtered=filtered, retried=retried, failed=failed
        )


@dataclass(slots=True, kw_only=True)
class _Run:
    attempts: Mapping[Key, int]
    outcome: Outcome = field(default_factory=Outcome)

    def set_back(self, key: Key, fault: StepFault, retry: Backoff | None = None) -> None:
        attempts = self.attempts[key] + 1
        next_try = next_try_after(fault, attempts=attempts, retry=retry or Backoff())
        self.outcome.setbacks.append(
            Setback(key=key, step=fault.step, error=fault.error, attempts=attempts, next_try=next_try)
        )


def next_try_after(fault: StepFault, *, attempts: int, retry: Backoff) -> float | None:
    """When to try again after failed try `attempts`, in seconds since 1970; `None` for never."""
    if not fault.may_pass or (retry.attempts is not None and attempts >= retry.attempts):
        return None
    delay_s = retry.delay_s(attempts)
    return time.time() + (delay_s if fault.after_s is None else max(fault.after_s, delay_s))


def _gone(item: Waiting | Entity[Any]) -> Document:
    return Document(key=item.key, version=item.version, committed_at=item.committed_at, body=None)


def _document(entity: Entity[Any], body: Any) -> Document:
    return Document(key=entity.key, version=entity.version, committed_at=entity.committed_at, body=to_mapping(body))
