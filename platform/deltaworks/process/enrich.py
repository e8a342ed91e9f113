"""Enrichment: many entities' ids gathered into few calls, and a failed call narrowed to who is at fault.

    entities ──► ids each needs ──► distinct ids ──► batches ──► calls, some at once
                                                                  │ failed
                      a smaller batch could do better ◄───────────┤
                      nobody in the batch is at fault ──► all its ids wait

Ids of entities that have failed before never share a call with fresh ones, so a bad id holds up no one new.
"""

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from deltaworks.process.app import EnrichStep
from deltaworks.process.entity import Entity
from deltaworks.process.fold import Key
from deltaworks.process.step import StepFault, call, fault_of

_NARROWING_CALLS = 128
"""Extra calls that one run may spend on narrowing: enough to find seven bad ids among 500, and no storm."""


@dataclass(slots=True, kw_only=True)
class Enriched:
    """What one run of an enrichment came to, by the key of the entity."""

    values: dict[Key, Any] = field(default_factory=dict)
    faults: dict[Key, StepFault] = field(default_factory=dict)
    used: dict[Key, frozenset[Key]] = field(default_factory=dict)
    id_count: int = 0
    call_count: int = 0


async def enrich(
    step: EnrichStep, entities: Sequence[Entity[Any]], *, suspects: frozenset[Key], clients: Mapping[str, Any]
) -> Enriched:
    """Ask for everything that the entities need; `suspects` are entities that have failed before."""
    result = Enriched()
    wanted: dict[Key, tuple[list[Any], bool]] = {}
    for entity in entities:
        try:
            ids, is_many = _ids(step.key(entity))
            result.used[entity.key] = frozenset(ids)
        except Exception as error:  # A step may raise anything; it is judged and kept with its key.
            result.faults[entity.key] = fault_of(step, error)
        else:
            wanted[entity.key] = ids, is_many
    asked = _Asked(step=step, clients=clients)
    fresh = dict.fromkeys(chain.from_iterable(ids for key, (ids, _) in wanted.items() if key not in suspects))
    tried = dict.fromkeys(chain.from_iterable(ids for key, (ids, _) in wanted.items() if key in suspects))
    await asked.ask(list(fresh), are_suspect=False)
    await asked.ask([id_ for id_ in tried if id_ not in fresh], are_suspect=True)
    for key, (ids, is_many) in wanted.items():
        fault = next((asked.faults[id_] for id_ in ids if id_ in asked.faults), None)
        if fault is not None:
            result.faults[key] = fault
        elif is_many:
            result.values[key] = {id_: asked.found[id_] for id_ in ids if id_ in asked.found}
        else:
            result.values[key] = asked.found.get(ids[0]) if ids else None
    result.id_count = len(asked.found)
    result.call_count = asked.call_count
    return result


@dataclass(slots=True, kw_only=True)
class _Asked:
    step: EnrichStep
    clients: Mapping[str, Any]
    found: dict[Any, Any] = field(default_factory=dict)
    faults: dict[Any, StepFault] = field(default_factory=dict)
    call_count: int = 0
    narrowing_calls: int = _NARROWING_CALLS
    gate: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.gate = asyncio.Semaphore(self.step.concurrency)

    async def ask(self, ids: list[Any], *, are_suspect: bool) -> None:
        if are_suspect:
            # Two bad ids that always share a half could not be told from a service that is down.
            random.shuffle(ids)
        size = self.step.batch
        await asyncio.gather(*(self._ask(ids[start : start + size], are_suspect) for start in range(0, len(ids), size)))

    async def _ask(self, ids: list[Any], are_suspect: bool) -> None:
        fault = await self._try(ids)
        if fault is not None:
            await self._narrow(ids, fault, are_suspect)

    async def _narrow(self, ids: list[Any], fault: StepFault, are_suspect: bool) -> None:
        """Blame the ids of a failed call, or halve it to find those to blame."""
        is_worth_it = not fault.is_down and (are_suspect or not fault.may_pass)
        if len(ids) == 1 or not is_worth_it:
            self._blame(ids, fault)
            return
        if self.narrowing_calls < 2:
            # Most of these ids are innocent: they wait and come again, and the next run looks further.
            self._blame(ids, replace(fault, may_pass=True))
            return
        self.narrowing_calls -= 2
        halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        faults = await asyncio.gather(*(self._try(half) for half in halves))
        if all(found is not None and found.may_pass for found in faults):
            self._blame(ids, fault)
            return
        for half, found in zip(halves, faults, strict=True):
            if found is not None:
                await self._narrow(half, found, are_suspect)

    async def _try(self, ids: list[Any]) -> StepFault | None:
        async with self.gate:
            self.call_count += 1
            try:
                answer = await call(self.step, ids, self.clients, timeout_s=self.step.timeout_s)
            except Exception as error:  # A step may raise anything; it is judged and kept with its key.
                return fault_of(self.step, error)
        if not isinstance(answer, Mapping):
            kind = type(answer).__name__
            return StepFault(
                step=self.step.name,
                error=f"returned {kind}, expected a mapping of ids ({self.step.place})",
                may_pass=False,
            )
        self.found.update(answer)
        return None

    def _blame(self, ids: Iterable[Any], fault: StepFault) -> None:
        self.faults.update(dict.fromkeys(ids, fault))


def _ids(needed: Any) -> tuple[list[Any], bool]:
    """The distinct ids an entity needs in their order, and whether it asked for many."""
    if needed is None or isinstance(needed, int | str):
        return ([] if needed is None else [needed]), False
    return list(dict.fromkeys(needed)), True
