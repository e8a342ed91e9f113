"""Running members of an app as one."""

from datetime import UTC, datetime

from deltaworks.process.live import Live, LiveStep
from deltaworks.process.live_total import total_of

AT = datetime(2026, 11, 26, tzinfo=UTC)


def live(documents: int, *, lag_p99_s: float | None, history: tuple[float, ...], step: LiveStep) -> Live:
    return Live(
        app="orders",
        pid=documents,
        started_at=AT,
        at=AT,
        changes=100,
        documents=documents,
        changes_per_s=50.0,
        documents_per_s=documents / 10,
        lag_p50_s=None,
        lag_p99_s=lag_p99_s,
        steps=(step,),
        sinks=(("Table", "table"),),
        history=history,
    )


def step(taken: int, *, p99_s: float, breaker: str | None, hit_share: float | None) -> LiveStep:
    return LiveStep(
        name="asks", kind="enrich", place="", taken=taken, p99_s=p99_s, breaker=breaker, hit_share=hit_share, per_s=1.5
    )


def test_work_is_added_and_of_what_is_slow_or_broken_the_worst_is_taken() -> None:
    one = live(3, lag_p99_s=0.1, history=(1.0, 2.0), step=step(5, p99_s=0.2, breaker="open", hit_share=None))
    two = live(4, lag_p99_s=None, history=(7.0,), step=step(6, p99_s=0.1, breaker="closed", hit_share=0.5))
    total = total_of([one, two])

    assert total is not None
    assert (total.documents, total.documents_per_s, total.lag_p50_s, total.lag_p99_s) == (7, 0.7, None, 0.1)
    # Each of them reads the whole log: changes are not added.
    assert (total.changes, total.changes_per_s) == (100, 50.0)
    # The newest second is the last of each.
    assert total.history == (1.0, 9.0)
    [asks] = total.steps
    assert (asks.taken, asks.per_s, asks.p99_s, asks.breaker, asks.hit_share) == (11, 3.0, 0.2, "open", 0.5)


def test_one_is_as_it_is_and_none_is_nothing() -> None:
    one = live(3, lag_p99_s=0.1, history=(), step=step(5, p99_s=0.2, breaker=None, hit_share=None))
    assert total_of([one]) == one
    assert total_of([]) is None
