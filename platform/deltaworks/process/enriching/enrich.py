"""Enrichment: many entities' ids gathered into few calls, and a failed call narrowed to who is at fault.

    entities ──► ids each needs ──► kept in the cache ──► answer
                                    asked for already ──► wait for that call
                                    else: batches ──► gate ──► breaker ──► rate ──► call
                                                                                     │ failed
                                          a smaller batch could do better ◄──────────┤
                                          nobody in the batch is at fault ──► all its ids wait

Ids of entities that have failed before never share a call with fresh ones, so a bad id holds up no one new.

A change of a looked-up row drops what is kept of its id (`drop`). A call that is under way at that moment may have
been answered from before the change: who asked for it gets its answer and is enriched again because of the change,
but the answer does not enter the cache, and nobody who asks later waits for it.
"""

import asyncio
import random
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import structlog

from deltaworks.process import metrics
from deltaworks.process.clock import SYSTEM, Clock
from deltaworks.process.declared import EnrichStep
from deltaworks.process.enriching.breaker import BreakerState, Circuit
from deltaworks.process.enriching.cache import UNKNOWN, AnswerCache
from deltaworks.process.enriching.limits import Gate, TokenBucket
from deltaworks.process.entity import Entity
from deltaworks.process.fitting import checker
from deltaworks.process.fold import Key
from deltaworks.process.step import STEP_ERRORS, StepFault, call, fault_of

_NARROWING_CALLS = 128
"""Extra calls that one run may spend on narrowing: enough to find seven bad ids among 500, and no storm."""
_LONGEST_RATE_WAIT_S = 1.0
"""A call that the rate would keep waiting for longer is not waited for: its keys are held, and others go on."""

logger = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Enriched:
    """What one run of an enrichment came to, by the key of the entity."""

    values: dict[Key, Any] = field(default_factory=dict)
    faults: dict[Key, StepFault] = field(default_factory=dict)
    used: dict[Key, frozenset[Key]] = field(default_factory=dict)
    id_count: int = 0


class Enricher:
    """One enrichment of a running app, with all it remembers between runs. One event loop; runs may overlap."""

    def __init__(self, step: EnrichStep, *, app: str, clients: Mapping[str, Any], clock: Clock = SYSTEM) -> None:
        self.step = step
        self._app = app
        self._clients = clients
        self._clock = clock
        self._gate = Gate(step.concurrency)
        self._bucket = TokenBucket(step.rate_per_s) if step.rate_per_s is not None else None
        self._circuit = Circuit(step.breaker, clock=clock, on_move=self._note_breaker)
        self._cache = AnswerCache(step.cache) if step.cache is not None else None
        self._answer_fault = _answer_checker(step)
        self._flights: dict[Key, _Flight] = {}
        self._counts = metrics.StepMetrics.of(app, step.name)

    async def enrich(self, entities: Sequence[Entity[Any]], *, suspects: frozenset[Key] = frozenset()) -> Enriched:
        """Ask for everything that the entities need; `suspects` are entities that have failed before."""
        result = Enriched()
        if self._bucket is not None:
            # Who has waited longest goes first: the rate may not reach to the end.
            entities = sorted(entities, key=lambda entity: entity.version)
        wanted = self._wanted(entities, result)
        fresh = dict.fromkeys(chain.from_iterable(ids for key, (ids, _) in wanted.items() if key not in suspects))
        tried = dict.fromkeys(chain.from_iterable(ids for key, (ids, _) in wanted.items() if key in suspects))
        answers = _Answers()
        await asyncio.gather(
            self._ask(list(fresh), answers, are_suspect=False),
            self._ask([id_ for id_ in tried if id_ not in fresh], answers, are_suspect=True),
        )
        found, faults = answers.found, answers.faults
        for key, (ids, is_many) in wanted.items():
            fault = next((faults[id_] for id_ in ids if id_ in faults), None) if faults else None
            if fault is not None:
                result.faults[key] = fault
            elif is_many:
                result.values[key] = {id_: found[id_] for id_ in ids if id_ in found}
            else:
                result.values[key] = found.get(ids[0]) if ids else None
        result.id_count = len(found)
        return result

    def drop(self, ids: Iterable[Key]) -> None:
        """Forget what is kept of these ids, and what calls under way will say of them: their rows changed."""
        ids = list(ids)
        if self._cache is not None:
            self._cache.drop(ids)
        for id_ in ids:
            if (flight := self._flights.pop(id_, None)) is not None:
                flight.dropped.add(id_)

    def drop_all(self) -> None:
        """Forget everything: the looked-up table was emptied."""
        if self._cache is not None:
            self._cache.clear()
        for id_, flight in self._flights.items():
            flight.dropped.add(id_)
        self._flights.clear()

    def tune(self, *, concurrency: int | None = None, rate_per_s: float | None = None) -> None:
        """Change limits while it runs; those left out stay as they are."""
        if concurrency is not None:
            self._gate.limit = concurrency
        if rate_per_s is not None:
            self._bucket = self._bucket or TokenBucket(rate_per_s)
            self._bucket.rate_per_s = rate_per_s

    @property
    def breaker(self) -> BreakerState:
        """Where the breaker stands."""
        return self._circuit.state

    # Asking

    def _wanted(self, entities: Sequence[Entity[Any]], result: Enriched) -> dict[Key, tuple[list[Any], bool]]:
        wanted: dict[Key, tuple[list[Any], bool]] = {}
        for entity in entities:
            try:
                ids, is_many = _ids(self.step.key(entity))
            except _WrongIdError as error:
                text = f"key gave {error}, expected int or str, or a list of them ({self.step.place})"
                result.faults[entity.key] = StepFault(step=self.step.name, error=text, may_pass=False)
            except STEP_ERRORS as error:
                result.faults[entity.key] = fault_of(self.step, error)
            else:
                wanted[entity.key] = ids, is_many
                if self.step.lookup is not None:
                    result.used[entity.key] = frozenset(ids)
        return wanted

    async def _ask(self, ids: list[Any], answers: "_Answers", *, are_suspect: bool) -> None:
        missing, joined = self._at_hand(ids, answers)
        if are_suspect:
            # Two bad ids that always share a half could not be told from a service that is down.
            random.shuffle(missing)
        size = self.step.batch
        own = [_Flight(missing[start : start + size]) for start in range(0, len(missing), size)]
        for flight in own:
            self._flights.update(dict.fromkeys(flight.ids, flight))
        budget = _Budget()
        await asyncio.gather(
            *(self._fly(flight, budget, are_suspect) for flight in own), *(flight.done.wait() for flight in joined)
        )
        for flight in own:
            answers.found.update(flight.found)
            answers.faults.update(flight.faults)
        for flight, waited in joined.items():
            answers.found.update((id_, flight.found[id_]) for id_ in waited if id_ in flight.found)
            answers.faults.update((id_, flight.faults[id_]) for id_ in waited if id_ in flight.faults)

    def _at_hand(self, ids: list[Any], answers: "_Answers") -> tuple[list[Any], dict["_Flight", list[Any]]]:
        """The ids to ask for, and those that are being asked for, by their call; kept answers are taken."""
        if self._cache is None and not self._flights:
            return ids, {}
        missing: list[Any] = []
        joined: dict[_Flight, list[Any]] = {}
        now_s = self._clock.monotonic()
        negative = 0
        for id_ in ids:
            kept = self._cache.get(id_, now_s=now_s) if self._cache is not None else None
            if kept is UNKNOWN:
                negative += 1
            elif kept is not None:
                answers.found[id_] = kept
            elif (flight := self._flights.get(id_)) is not None:
                joined.setdefault(flight, []).append(id_)
            else:
                missing.append(id_)
        joined_count = sum(map(len, joined.values()))
        hits = len(ids) - len(missing) - joined_count - negative
        self._counts.cache(hits=hits, negative=negative, misses=len(missing), joined=joined_count)
        return missing, joined

    async def _fly(self, flight: "_Flight", budget: "_Budget", are_suspect: bool) -> None:
        try:
            fault = await self._try(flight, flight.ids, are_suspect)
            if fault is not None:
                await self._narrow(flight, flight.ids, fault, budget, are_suspect)
        except BaseException:
            # The run was given up; whoever waits for this call asks again.
            flight.blame(flight.ids, _not_tried(self.step, "the call was given up", after_s=0.0))
            raise
        finally:
            for id_ in flight.ids:
                if self._flights.get(id_) is flight:
                    del self._flights[id_]
            flight.done.set()

    async def _narrow(
        self, flight: "_Flight", ids: list[Any], fault: StepFault, budget: "_Budget", are_suspect: bool
    ) -> None:
        """Blame the ids of a failed call, or halve it to find those to blame."""
        is_worth_it = not fault.is_down and (are_suspect or not fault.may_pass)
        if len(ids) == 1 or not is_worth_it:
            flight.blame(ids, fault)
            return
        if budget.calls < 2:
            # Most of these ids are innocent: they wait and come again, and the next run looks further.
            flight.blame(ids, replace(fault, may_pass=True))
            return
        budget.calls -= 2
        halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        faults = await asyncio.gather(*(self._try(flight, half, are_suspect) for half in halves))
        if all(found is not None and found.may_pass for found in faults):
            # Neither half says anything of its ids, so none of them may be given up for what all were told.
            flight.blame(ids, replace(fault, may_pass=True))
            return
        for half, found in zip(halves, faults, strict=True):
            if found is not None:
                await self._narrow(flight, half, found, budget, are_suspect)

    # One call

    async def _try(self, flight: "_Flight", ids: list[Any], are_suspect: bool) -> StepFault | None:
        async with self._gate:
            admission = await self._circuit.admit()
            if admission.wait_s is not None:
                return _not_tried(self.step, self._why_refused(), after_s=admission.wait_s)
            has_reported = False
            try:
                if (late := await self._wait_for_rate()) is not None:
                    return late
                asked_at_s = self._clock.monotonic()
                fault = await self._call(flight, ids, asked_at_s)
                has_failed = fault is not None and fault.may_pass and (fault.is_down or not are_suspect)
                self._circuit.report(admission, has_failed=has_failed)
                has_reported = True
            finally:
                if not has_reported:
                    self._circuit.abandon(admission)
            if fault is not None and fault.is_down and fault.after_s:
                self._circuit.pause(fault.after_s)
            return fault

    async def _wait_for_rate(self) -> StepFault | None:
        if self._bucket is None:
            return None
        now_s = self._clock.monotonic()
        wait_s = self._bucket.wait_s(now_s=now_s)
        if wait_s > _LONGEST_RATE_WAIT_S:
            return _not_tried(self.step, f"more than {self._bucket.rate_per_s:g} calls a second", after_s=wait_s)
        self._bucket.take(now_s=now_s)
        if wait_s > 0:
            self._counts.wait_for_rate(wait_s)
            await self._clock.sleep(wait_s)
        return None

    async def _call(self, flight: "_Flight", ids: list[Any], asked_at_s: float) -> StepFault | None:
        began_at = time.monotonic()
        try:
            answer = await call(self.step, ids, self._clients, timeout_s=self.step.timeout_s)
        except STEP_ERRORS as error:
            fault: StepFault | None = fault_of(self.step, error)
        else:
            fault = self._take(flight, ids, answer, asked_at_s)
        self._counts.call(seconds=time.monotonic() - began_at, has_failed=fault is not None)
        return fault

    def _take(self, flight: "_Flight", ids: list[Any], answer: Any, asked_at_s: float) -> StepFault | None:
        """Take an answer apart: what was found, what is unknown, and what is wrong about it."""
        if not isinstance(answer, Mapping):
            return self._wrong(f"returned {type(answer).__name__}, expected a mapping of ids")
        found = {id_: answer[id_] for id_ in ids if id_ in answer}
        if answer and not found:
            other = type(next(iter(answer))).__name__
            return self._wrong(f"returned ids that were not asked for ({other}, asked for {type(ids[0]).__name__})")
        absent = [id_ for id_ in ids if id_ not in found] if len(found) < len(ids) else []
        unknown = [id_ for id_, value in found.items() if value is None]
        for id_ in unknown:
            del found[id_]
        if self._answer_fault is not None:
            self._check(flight, found)
        if absent and self.step.partial == "retry":
            text = f"answered for {len(ids) - len(absent)} of {len(ids)} ids"
            flight.blame(absent, StepFault(step=self.step.name, error=text, may_pass=True))
        else:
            unknown += absent
        flight.found.update(found)
        if self._cache is not None:
            if flight.dropped:
                found = {id_: value for id_, value in found.items() if id_ not in flight.dropped}
                unknown = [id_ for id_ in unknown if id_ not in flight.dropped]
            self._cache.put(found, unknown, asked_at_s=asked_at_s)
        return None

    def _check(self, flight: "_Flight", found: dict[Key, Any]) -> None:
        if self._answer_fault is None:
            return
        wrong = {id_: fault for id_, value in found.items() if (fault := self._answer_fault(value)) is not None}
        for id_, fault in wrong.items():
            del found[id_]
            flight.blame([id_], self._wrong(f"returned what is not as declared, {fault}"))

    def _wrong(self, what: str) -> StepFault:
        return StepFault(step=self.step.name, error=f"{what} ({self.step.place})", may_pass=False)

    def _why_refused(self) -> str:
        return "the breaker is open" if self.breaker is BreakerState.OPEN else "the service asked for a pause"

    def _note_breaker(self, state: BreakerState) -> None:
        self._counts.breaker(state)
        if state is BreakerState.OPEN:
            logger.warning("breaker opened", app=self._app, step=self.step.name)
        elif state is BreakerState.CLOSED:
            logger.info("breaker closed", app=self._app, step=self.step.name)


class _Flight:
    """A batch of ids that is being asked for; complete when `done` is set."""

    __slots__ = ("done", "dropped", "faults", "found", "ids")

    def __init__(self, ids: list[Any]) -> None:
        self.ids = ids
        self.found: dict[Any, Any] = {}
        self.faults: dict[Any, StepFault] = {}
        self.dropped: set[Any] = set()
        self.done = asyncio.Event()

    def blame(self, ids: Iterable[Any], fault: StepFault) -> None:
        self.faults.update(dict.fromkeys(ids, fault))


@dataclass(slots=True)
class _Answers:
    found: dict[Any, Any] = field(default_factory=dict)
    faults: dict[Any, StepFault] = field(default_factory=dict)


@dataclass(slots=True)
class _Budget:
    calls: int = _NARROWING_CALLS


class _WrongIdError(Exception):
    """An id that is neither int nor str."""


def _ids(needed: Any) -> tuple[list[Any], bool]:
    """The distinct ids an entity needs in their order, and whether it asked for many."""
    if needed is None or isinstance(needed, int | str):
        return ([] if needed is None else [needed]), False
    if not isinstance(needed, Iterable):
        raise _WrongIdError(type(needed).__name__)
    ids = list(dict.fromkeys(needed))
    for id_ in ids:
        if not isinstance(id_, int | str):
            raise _WrongIdError(f"a list with {type(id_).__name__}")
    return ids, True


def _not_tried(step: EnrichStep, why: str, *, after_s: float) -> StepFault:
    return StepFault(step=step.name, error=why, may_pass=True, is_down=True, after_s=after_s, was_tried=False)


def _answer_checker(step: EnrichStep) -> Callable[[Any], str | None] | None:
    """Judges one id's answer by the step's return type, e.g. `dict[int, Person]`; `None` where it declares none."""
    try:
        declared = typing.get_type_hints(step.function).get("return")
    except NameError:
        # A type of the function's own scope, which cannot be seen from here.
        return None
    arguments = typing.get_args(declared)
    origin = typing.get_origin(declared)
    if not (isinstance(origin, type) and issubclass(origin, Mapping)) or len(arguments) != 2 or arguments[1] is Any:
        return None
    return checker(arguments[1])
