"""Counters of the stream apps, for `/metrics`; one sample is a dictionary look-up and an addition."""

from prometheus_client import Counter, Gauge, Histogram

STEP_OUTCOMES = Counter(
    "deltaworks_process_step_total",
    "Entities by what a step did with them: in, out, filtered, retried, failed, late.",
    ("app", "step", "outcome"),
)
CHANGES = Counter("deltaworks_process_changes_total", "Changes folded into the state.", ("app",))
DOCUMENTS = Counter("deltaworks_process_documents_total", "Documents made durable in every sink.", ("app",))
STANDING = Gauge("deltaworks_process_entities", "Entities that are held or dead now.", ("app", "standing"))
LAG = Histogram(
    "deltaworks_process_lag_seconds",
    "From the commit in the source to durable and visible in every sink.",
    ("app",),
    buckets=(0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)


def count_step(
    app: str, step: str, *, taken: int, out: int, filtered: int = 0, retried: int = 0, failed: int = 0, late: int = 0
) -> None:
    """Add one run of a step over a batch of entities."""
    for outcome, count in (
        ("in", taken),
        ("out", out),
        ("filtered", filtered),
        ("retried", retried),
        ("failed", failed),
        ("late", late),
    ):
        if count:
            STEP_OUTCOMES.labels(app, step, outcome).inc(count)
