"""One enrichment by itself: limits, breaker, cache, coalescing, wrong answers. The clock is moved by hand."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from deltaworks.errors import RetryableError
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App, Breaker, Source, Ttl
from deltaworks.process.enriching.breaker import BreakerState
from deltaworks.process.enriching.cache import UNKNOWN, AnswerCache
from deltaworks.process.enriching.enrich import Enriched, Enricher
from deltaworks.process.enriching.limits import Gate, TokenBucket
from deltaworks.process.entity import Entity
from deltaworks.testing.clock import HandClock

Ask = Callable[[list[int]], Awaitable[Any]]


class Row(TypedDict):
    ids: list[int]


def enricher(ask: Any, clock: HandClock, *, name: str = "people", **options: Any) -> Enricher:
    """An enrichment of entities that are the lists of ids they need."""
    studio = Source("studio")
    app = App("films", key="film_id", sources=[studio.table("film", schema=Row)])
    ask.__name__ = name
    app.enrich(into="people", key=lambda entity: entity.after["ids"], **options)(ask)
    return Enricher(app.enrichments[0], app="films", clients={}, clock=clock)


def entities(*needs: Any) -> list[Entity[Any]]:
    """Entities 0, 1, … that need these ids."""
    return [
        Entity(
            key=key,
            after={"ids": ids},
            version=Version(Lsn(key), 0),
            committed_at=datetime(2026, 1, 1, tzinfo=UTC),
            related={},
        )
        for key, ids in enumerate(needs)
    ]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=20))


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until it holds."""
    while not condition():
        await asyncio.sleep(0)


class Names:
    """Knows the ids below 100 and remembers what it was asked; holds its answers while `gate` is closed."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.version = 0
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self, ids: list[int]) -> dict[int, str]:
        self.calls.append(list(ids))
        answer = {id_: f"{id_}v{self.version}" for id_ in ids if id_ < 100}
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return answer


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def names() -> Names:
    return Names()


def function(names: Names) -> Any:
    async def ask(ids: list[int]) -> dict[int, str]:
        return await names.ask(ids)

    return ask


# The rate


@given(rate=st.floats(0.5, 1000), gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=200))
def test_in_any_stretch_of_time_no_more_calls_begin_than_the_rate_allows(rate: float, gaps: list[float]) -> None:
    bucket, now, begins = TokenBucket(rate), 0.0, []
    for gap in gaps:
        now += gap
        begins.append(now + bucket.take(now_s=now))

    assert begins == sorted(begins)
    for start in range(len(begins)):
        for end in range(start, len(begins)):
            assert end - start + 1 <= bucket.burst + rate * (begins[end] - begins[start]) + 1e-6


def test_calls_wait_for_the_rate_and_those_that_would_wait_long_are_held_without_an_attempt(
    names: Names, clock: HandClock
) -> None:
    async def story() -> Enriched:
        asked = enricher(function(names), clock, rate_per_s=4, batch=1, concurrency=50)
        running = asyncio.ensure_future(asked.enrich(entities(*([number] for number in range(8)))))
        for waiting in (4, 3, 2, 1):
            await until(lambda expected=waiting: clock.sleepers == expected)
            clock.advance(0.25)
        return await running

    found = run(story())

    assert sorted(found.values) == [0, 1, 2, 3, 4]
    assert [(fault.was_tried, fault.may_pass, fault.after_s) for fault in found.faults.values()] == [
        (False, True, 1.25)
    ] * 3


def test_limits_can_be_changed_while_it_runs() -> None:
    async def story() -> list[int]:
        gate, inside, most = Gate(2), 0, []

        async def enter() -> None:
            nonlocal inside
            async with gate:
                inside += 1
                most.append(inside)
                await asyncio.sleep(0)
                inside -= 1

        tasks = [asyncio.ensure_future(enter()) for _ in range(50)]
        tasks[20].cancel()
        await asyncio.sleep(0)
        await until(lambda: len(most) > 10)
        seen = [max(most)]
        most.clear()
        gate.limit = 5
        await asyncio.gather(*tasks, return_exceptions=True)
        return [*seen, max(most), inside]

    assert run(story()) == [2, 5, 0]


# The breaker


def test_the_breaker_opens_probes_once_and_closes(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, breaker=Breaker(failures=3, open_s=30), batch=1, concurrency=1)
        names.fault = RetryableError("away")
        found = await asked.enrich(entities([1], [2], [3], [4], [5]))
        assert asked.breaker is BreakerState.OPEN
        assert [fault.was_tried for fault in found.faults.values()] == [True, True, True, False, False]
        assert found.faults[4].after_s == 30
        assert len(names.calls) == 3

        clock.advance(29.9)
        await asked.enrich(entities([1]))
        assert len(names.calls) == 3

        clock.advance(0.2)
        await asked.enrich(entities([1], [2]))
        assert (len(names.calls), asked.breaker) == (4, BreakerState.OPEN)

        clock.advance(30)
        names.fault = None
        assert len((await asked.enrich(entities([1], [2], [3]))).values) == 3
        assert asked.breaker is BreakerState.CLOSED

    run(story())
    assert REGISTRY.get_sample_value("deltaworks_process_breaker", {"app": "films", "step": "people"}) == 0


def test_while_the_probe_is_out_the_others_wait_for_what_it_finds(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, breaker=Breaker(failures=1, open_s=30), batch=1, concurrency=8)
        names.fault = RetryableError("away")
        await asked.enrich(entities([1]))
        clock.advance(30)
        names.fault = None
        names.gate.clear()
        running = asyncio.ensure_future(asked.enrich(entities([1], [2], [3])))
        await until(lambda: len(names.calls) == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(names.calls), asked.breaker) == (2, BreakerState.HALF_OPEN)
        names.gate.set()
        assert len((await running).values) == 3

    run(story())


def test_a_probe_that_is_given_up_lets_the_next_call_be_the_probe(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, breaker=Breaker(failures=1, open_s=30))
        names.fault = RetryableError("away")
        await asked.enrich(entities([1]))
        clock.advance(30)
        names.gate.clear()
        running = asyncio.ensure_future(asked.enrich(entities([1])))
        await until(lambda: len(names.calls) == 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        names.fault = None
        names.gate.set()
        assert (await asked.enrich(entities([1]))).values == {0: {1: "1v0"}}
        assert asked.breaker is BreakerState.CLOSED

    run(story())


def test_a_call_that_is_refused_for_what_it_asks_shows_that_the_service_is_there(
    names: Names, clock: HandClock
) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, breaker=Breaker(failures=2), batch=1)
        names.fault = ValueError("nobody of that number")
        await asked.enrich(entities([1], [2], [3], [4]))
        assert (len(names.calls), asked.breaker) == (4, BreakerState.CLOSED)

    run(story())


# The cache


def test_answers_are_kept_for_their_time_and_unknown_ids_for_a_shorter_one(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, name="cached", cache=Ttl(600, negative_s=10))
        assert (await asked.enrich(entities([1, 100]))).values == {0: {1: "1v0"}}
        names.version = 1
        clock.advance(9)
        assert (await asked.enrich(entities([1, 100], [1]))).values == {0: {1: "1v0"}, 1: {1: "1v0"}}
        assert len(names.calls) == 1
        clock.advance(2)
        await asked.enrich(entities([1, 100]))
        assert names.calls[1:] == [[100]]
        clock.advance(600)
        assert (await asked.enrich(entities([1]))).values == {0: {1: "1v1"}}

    run(story())
    counts = {
        result: REGISTRY.get_sample_value(
            "deltaworks_process_cache_total", {"app": "films", "step": "cached", "result": result}
        )
        for result in ("hit", "negative", "miss")
    }
    assert counts == {"hit": 2, "negative": 1, "miss": 4}


def test_an_answers_age_counts_from_the_beginning_of_its_call(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, cache=Ttl(10))
        names.gate.clear()
        running = asyncio.ensure_future(asked.enrich(entities([1])))
        await until(lambda: len(names.calls) == 1)
        clock.advance(9)
        names.gate.set()
        await running
        clock.advance(2)
        await asked.enrich(entities([1]))
        assert len(names.calls) == 2

    run(story())


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "unknown", "drop", "get", "wait"]), st.integers(0, 9)), max_size=60),
    st.integers(1, 5),
)
def test_the_cache_never_gives_what_is_old_dropped_or_too_much(steps: list[tuple[str, int]], max_items: int) -> None:
    cache, now, model = AnswerCache(Ttl(10, max_items=max_items, negative_s=3)), 0.0, {}
    for number, (what, id_) in enumerate(steps):
        if what == "put":
            cache.put({id_: number}, [], asked_at_s=now)
            model[id_] = (now + 10, number)
        elif what == "unknown":
            cache.put({}, [id_], asked_at_s=now)
            model[id_] = (now + 3, UNKNOWN)
        elif what == "drop":
            cache.drop([id_])
            model.pop(id_, None)
        elif what == "wait":
            now += id_
        else:
            expires, answer = model.get(id_, (0, None))
            assert cache.get(id_, now_s=now) in ((answer, None) if expires > now else (None,))
        assert len(cache) <= max_items


def test_the_longest_unused_answer_leaves_first(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, cache=Ttl(600, max_items=2))
        await asked.enrich(entities([1, 2]))
        await asked.enrich(entities([1]))
        await asked.enrich(entities([3]))
        await asked.enrich(entities([1, 3]))
        assert names.calls == [[1, 2], [3]]

    run(story())


def test_an_answer_of_a_call_from_before_its_row_changed_does_not_enter_the_cache(
    names: Names, clock: HandClock
) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock, cache=Ttl(600))
        names.gate.clear()
        early = asyncio.ensure_future(asked.enrich(entities([1, 2])))
        await until(lambda: len(names.calls) == 1)
        names.version = 1
        asked.drop([1])
        late = asyncio.ensure_future(asked.enrich(entities([1, 2])))
        await until(lambda: len(names.calls) == 2)
        names.gate.set()

        assert (await early).values == {0: {1: "1v0", 2: "2v0"}}
        assert (await late).values == {0: {1: "1v1", 2: "2v0"}}
        assert names.calls[1] == [1]
        assert (await asked.enrich(entities([1, 2]))).values == {0: {1: "1v1", 2: "2v0"}}
        assert len(names.calls) == 2

    run(story())


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_the_timing_nothing_kept_is_older_than_the_last_change_that_was_told(dice: random.Random) -> None:
    clock, rows = HandClock(), dict.fromkeys(range(4), 0)

    async def story() -> None:
        held: list[asyncio.Event] = []

        async def ask(ids: list[int]) -> dict[int, int]:
            answer = {id_: rows[id_] for id_ in ids}
            held.append(asyncio.Event())
            await held[-1].wait()
            if dice.random() < 0.2:
                raise RetryableError("away")
            return answer

        asked = enricher(ask, clock, cache=Ttl(600), batch=2, concurrency=3)

        async def need(ids: Sequence[int]) -> None:
            told = {id_: rows[id_] for id_ in ids}
            found = await asked.enrich(entities(ids))
            for id_, value in (found.values.get(0) or {}).items():
                # Whoever asks after the change was told sees it, or a later one.
                assert value >= told[id_]

        running: list[asyncio.Future[None]] = []
        for _ in range(40):
            match dice.randrange(3):
                case 0:
                    running.append(asyncio.ensure_future(need(dice.sample(range(4), dice.randint(1, 4)))))
                case 1:
                    changed = dice.sample(range(4), dice.randint(1, 2))
                    for id_ in changed:
                        rows[id_] += 1
                    asked.drop(changed) if dice.random() < 0.9 else asked.drop_all()
                case _ if held:
                    dice.choice(held).set()
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
        while not all(task.done() for task in running):
            for event in held:
                event.set()
            await asyncio.sleep(0)
        await asyncio.gather(*running)
        assert asked._flights == {}

    run(story())


# Coalescing


def test_an_id_that_is_being_asked_for_is_not_asked_for_again(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock)
        names.gate.clear()
        first = asyncio.ensure_future(asked.enrich(entities([1, 2])))
        await until(lambda: len(names.calls) == 1)
        second = asyncio.ensure_future(asked.enrich(entities([2, 3], [1])))
        await until(lambda: len(names.calls) == 2)
        names.gate.set()
        await first
        assert (await second).values == {0: {2: "2v0", 3: "3v0"}, 1: {1: "1v0"}}
        assert names.calls == [[1, 2], [3]]

    run(story())


def test_who_waits_for_a_call_that_is_given_up_is_held_and_loses_no_attempt(names: Names, clock: HandClock) -> None:
    async def story() -> None:
        asked = enricher(function(names), clock)
        names.gate.clear()
        first = asyncio.ensure_future(asked.enrich(entities([1])))
        await until(lambda: len(names.calls) == 1)
        second = asyncio.ensure_future(asked.enrich(entities([1])))
        await asyncio.sleep(0)
        first.cancel()
        fault = (await second).faults[0]
        assert (fault.may_pass, fault.was_tried) == (True, False)

    run(story())


# Answers that are wrong


def answering(answer: Any) -> Any:
    async def ask(ids: list[int]) -> dict[int, str]:
        return answer(ids)

    return ask


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda ids: None, "returned NoneType, expected a mapping of ids"),
        (lambda ids: [1], "returned list, expected a mapping of ids"),
        (lambda ids: {"1": "Ada"}, "returned ids that were not asked for (str, asked for int)"),
        (lambda ids: {1: ["Ada"]}, "returned what is not as declared, : expected str, got list"),
    ],
)
def test_an_answer_of_the_wrong_shape_is_a_fault_of_the_step_with_its_place(
    answer: Any, error: str, clock: HandClock
) -> None:
    found = run(enricher(answering(answer), clock).enrich(entities([1])))

    fault = found.faults[0]
    assert not fault.may_pass
    assert fault.error.startswith(error)
    assert f"({__file__}:" in fault.error


def test_an_id_left_out_is_unknown_or_asked_for_again_as_the_step_says(clock: HandClock) -> None:
    def answer(ids: list[int]) -> dict[int, Any]:
        return {1: "Ada", 2: None}

    tolerant = run(enricher(answering(answer), clock).enrich(entities([1], [2], [3])))
    assert tolerant.values == {0: {1: "Ada"}, 1: {}, 2: {}}

    strict = run(enricher(answering(answer), clock, partial="retry").enrich(entities([1], [2], [3])))
    assert strict.values == {0: {1: "Ada"}, 1: {}}
    assert (strict.faults[2].may_pass, strict.faults[2].error) == (True, "answered for 2 of 3 ids")


def test_an_answer_nobody_asked_for_is_left_aside(clock: HandClock) -> None:
    asked = enricher(answering(lambda ids: {1: "Ada", 7: "Bo"}), clock, cache=Ttl(600))

    found = run(asked.enrich(entities([1])))

    assert (found.values, found.id_count) == ({0: {1: "Ada"}}, 1)


@pytest.mark.parametrize(("ids", "kind"), [(2.5, "float"), ([1, None], "a list with NoneType"), ({3.5}, "a list")])
def test_an_id_that_is_neither_number_nor_text_is_a_fault_of_its_entity(
    ids: Iterable[Any], kind: str, names: Names, clock: HandClock
) -> None:
    found = run(enricher(function(names), clock).enrich(entities(ids, [1])))

    assert found.values == {1: {1: "1v0"}}
    assert found.faults[0].error.startswith(f"key gave {kind}")
