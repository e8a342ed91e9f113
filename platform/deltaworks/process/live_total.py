"""Several running members of an app as one: counts and rates are added, of latencies the worst is taken."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from deltaworks.process.live import Live, LiveStep

_BREAKER_ORDER = (None, "closed", "half-open", "open")


def total_of(lives: Sequence[Live]) -> Live | None:
    """All of them as one, which is as old as the newest of them and began when the first of them did.

    Percentiles of several histograms cannot be added, so a median here is the worst median, and so on; the share of
    a cache's hits is the lowest. `None` where there is nothing to add.
    """
    if not lives:
        return None
    first, *others = lives
    for other in others:
        first = _add(first, other)
    return first


def _add(one: Live, other: Live) -> Live:
    more = {step.name: step for step in other.steps}
    return replace(
        one,
        started_at=min(one.started_at, other.started_at),
        at=max(one.at, other.at),
        changes=max(one.changes, other.changes),
        changes_per_s=max(one.changes_per_s, other.changes_per_s),
        documents=one.documents + other.documents,
        documents_per_s=round(one.documents_per_s + other.documents_per_s, 1),
        lag_p50_s=_worst([one.lag_p50_s, other.lag_p50_s]),
        lag_p99_s=_worst([one.lag_p99_s, other.lag_p99_s]),
        steps=tuple(_add_step(step, more[step.name]) if step.name in more else step for step in one.steps),
        # Each has the newest second last.
        history=tuple(
            round(a + b, 1) for a, b in zip_longest(reversed(one.history), reversed(other.history), fillvalue=0.0)
        )[::-1],
    )


def _add_step(one: LiveStep, other: LiveStep) -> LiveStep:
    shares = [share for share in (one.hit_share, other.hit_share) if share is not None]
    return replace(
        one,
        taken=one.taken + other.taken,
        out=one.out + other.out,
        filtered=one.filtered + other.filtered,
        same=one.same + other.same,
        retried=one.retried + other.retried,
        failed=one.failed + other.failed,
        per_s=round(one.per_s + other.per_s, 1),
        calls=one.calls + other.calls,
        failed_calls=one.failed_calls + other.failed_calls,
        p50_s=_worst([one.p50_s, other.p50_s]),
        p99_s=_worst([one.p99_s, other.p99_s]),
        hit_share=min(shares, default=None),
        breaker=max(one.breaker, other.breaker, key=_BREAKER_ORDER.index),
    )


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
