"""Counters of the stream apps, for `/metrics`; one sample is a dictionary look-up and an addition."""

from dataclasses import dataclass
from typing import Self

from prometheus_client import Counter, Gauge, Histogram

STEP_OUTCOMES = Counter(
    "deltaworks_process_step_total",
    "Entities by what a step did with them: in, out, filtered, same (dedup: it left like that before), retried, "
    "failed, late (window: for one that is closed).",
    ("app", "step", "outcome"),
)
LOST = Counter(
    "deltaworks_process_lost_total", "Entities that left no trace in a step and are processed again.", ("app", "step")
)
CHANGES = Counter("deltaworks_process_changes_total", "Changes folded into the state.", ("app",))
DOCUMENTS = Counter("deltaworks_process_documents_total", "Documents made durable in every sink.", ("app",))
STANDING = Gauge("deltaworks_process_entities", "Entities that are held or dead now.", ("app", "standing"))
SHARES = Gauge("deltaworks_process_shares", "Shares that this member of an app has.", ("app",))
WAITS = Gauge(
    "deltaworks_process_waits", "1 while an app waits for a sink, for the log, or for room on its disk.", ("app",)
)
STUCK = Gauge("deltaworks_process_stuck_seconds", "How long a step has not come back; 0 when it has.", ("app", "step"))
WINDOWS = Gauge(
    "deltaworks_process_windows",
    "Windows of event time: open, or closed, where changes come late. Counted every second or less often.",
    ("app", "step", "state"),
)
LAG = Histogram(
    "deltaworks_process_lag_seconds",
    "From the commit in the source to durable and visible in every sink.",
    ("app",),
    buckets=(0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
STEP_SECONDS = Histogram(
    "deltaworks_process_step_seconds",
    "How long a step took for one batch of entities.",
    ("app", "step"),
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CALLS = Counter(
    "deltaworks_process_calls_total", "Calls of a service by outcome: ok, failed.", ("app", "step", "outcome")
)
CALL_SECONDS = Histogram(
    "deltaworks_process_call_seconds",
    "How long a call of a service took, failed ones too.",
    ("app", "step"),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
CACHE = Counter(
    "deltaworks_process_cache_total",
    "Ids by where the answer came from: hit, negative (kept as unknown), miss (asked for), joined (being asked for).",
    ("app", "step", "result"),
)
RATE_WAIT_SECONDS = Counter(
    "deltaworks_process_rate_wait_seconds_total", "Seconds that calls waited to keep the rate.", ("app", "step")
)
BREAKER = Gauge("deltaworks_process_breaker", "The breaker: 0 closed, 1 half-open, 2 open.", ("app", "step"))

APP_METRICS = (
    STEP_OUTCOMES,
    LOST,
    CHANGES,
    DOCUMENTS,
    STANDING,
    SHARES,
    WAITS,
    WINDOWS,
    LAG,
    STEP_SECONDS,
    CALLS,
    CALL_SECONDS,
    CACHE,
    RATE_WAIT_SECONDS,
    BREAKER,
)
"""All of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """The samples of one enrichment, looked up once."""

    calls_ok: Counter
    calls_failed: Counter
    call_seconds: Histogram
    hits: Counter
    negatives: Counter
    misses: Counter
    joins: Counter
    rate_wait_seconds: Counter
    breaker_state: Gauge

    @classmethod
    def of(cls, app: str, step: str) -> Self:
        """Those of this step."""
        return cls(
            calls_ok=CALLS.labels(app, step, "ok"),
            calls_failed=CALLS.labels(app, step, "failed"),
            call_seconds=CALL_SECONDS.labels(app, step),
            hits=CACHE.labels(app, step, "hit"),
            negatives=CACHE.labels(app, step, "negative"),
            misses=CACHE.labels(app, step, "miss"),
            joins=CACHE.labels(app, step, "joined"),
            rate_wait_seconds=RATE_WAIT_SECONDS.labels(app, step),
            breaker_state=BREAKER.labels(app, step),
        )

    def call(self, *, seconds: float, has_failed: bool) -> None:
        """Add a call."""
        (self.calls_failed if has_failed else self.calls_ok).inc()
        self.call_seconds.observe(seconds)

    def cache(self, *, hits: int, negative: int, misses: int, joined: int) -> None:
        """Add the ids of one run."""
        for counter, count in (
            (self.hits, hits),
            (self.negatives, negative),
            (self.misses, misses),
            (self.joins, joined),
        ):
            if count:
                counter.inc(count)

    def wait_for_rate(self, seconds: float) -> None:
        """Add time that a call waits."""
        self.rate_wait_seconds.inc(seconds)

    def breaker(self, state: int) -> None:
        """Show where the breaker stands."""
        self.breaker_state.set(state)


def documents_of(app: str) -> float:
    """Documents of an app that this process made durable."""
    samples = (sample for metric in DOCUMENTS.labels(app).collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def count_step(
    app: str,
    step: str,
    *,
    taken: int,
    out: int,
    filtered: int = 0,
    same: int = 0,
    retried: int = 0,
    failed: int = 0,
    late: int = 0,
) -> None:
    """Add one run of a step over a batch of entities."""
    for outcome, count in (
        ("in", taken),
        ("out", out),
        ("filtered", filtered),
        ("same", same),
        ("retried", retried),
        ("failed", failed),
        ("late", late),
    ):
        if count:
            STEP_OUTCOMES.labels(app, step, outcome).inc(count)
