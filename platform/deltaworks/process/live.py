"""How a running app is doing, for other processes: a small file that its service writes every second.

    home/process/<app>/live.json     written beside its place and renamed; not synced, because it is about now

It is made of the same counters as `/metrics`, so the two never disagree. What the file does not have (keys that
wait, dead letters, how far the log is read) stands in the app's state, which any process may read.
"""

import bisect
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import structlog

from deltaworks.beside import beside
from deltaworks.process import metrics
from deltaworks.process.app import App
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.windows import count_windows

logger = structlog.get_logger(__name__)

LIVE_FILE = "live.json"
"""In the folder of the app."""
EVERY_S = 1.0
RATE_OVER_S = 10.0
"""Rates are of this long: short enough to see a change, long enough to read a number."""
LATENCY_OVER_S = 60.0
HISTORY = 120
"""Seconds of the past that a graph shows."""
_COUNTING_SHARE = 50
"""Windows are counted in no more than one part in so many of the time."""
_BREAKER = ("closed", "half-open", "open")

Samples = Mapping[tuple[str, ...], float]
"""By the name of the sample and its labels' values, but for the app's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStep:
    """One step: what it did since the service started, and how it does now.

    Latencies are of the last minute, read off a histogram, in seconds: of a call where the step calls a service, else
    of one batch. `hit_share` is of the ids in that minute; `None` where there is no cache, or nothing was asked.
    `same` documents were held back by `dedup`; `late` ones came for a window that is closed. The windows are counted
    as they are now, `None` where the step has none.
    """

    name: str
    kind: str
    place: str
    taken: int = 0
    out: int = 0
    filtered: int = 0
    same: int = 0
    retried: int = 0
    failed: int = 0
    late: int = 0
    per_s: float = 0.0
    calls: int = 0
    failed_calls: int = 0
    p50_s: float | None = None
    p99_s: float | None = None
    hit_share: float | None = None
    breaker: str | None = None
    windows_open: int | None = None
    windows_closed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A running app at one moment. Counts are since the service started, rates of the last ten seconds.

    `history` has the documents of each of the last seconds, the newest last.
    """

    app: str
    pid: int
    started_at: datetime
    at: datetime
    changes: int
    documents: int
    changes_per_s: float
    documents_per_s: float
    lag_p50_s: float | None
    lag_p99_s: float | None
    steps: tuple[LiveStep, ...]
    sinks: tuple[tuple[str, str], ...]
    history: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The status as JSON values."""
        return asdict(self) | {"started_at": self.started_at.isoformat(), "at": self.at.isoformat()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        made = {
            "started_at": datetime.fromisoformat(stored["started_at"]),
            "at": datetime.fromisoformat(stored["at"]),
            "steps": tuple(LiveStep(**step) for step in stored["steps"]),
            "sinks": tuple((kind, name) for kind, name in stored["sinks"]),
            "history": tuple(stored["history"]),
        }
        return cls(**(dict(stored) | made))


def read_live(app_folder: Path) -> Live | None:
    """The status that was written last; `None` where there is none, or one of another version of Deltaworks."""
    try:
        return Live.from_json(json.loads((app_folder / LIVE_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def publishing(app: App, *, name: str, folder: Path) -> Iterator[None]:
    """Write the status every second, in a thread, while inside; a step that hangs does not stop it."""
    watch = Watch(app, name=name, state_file=folder / STATE_FILE)

    def publish(stop: threading.Event) -> None:
        while True:
            try:
                _write(folder / LIVE_FILE, watch.look())
            except OSError as error:
                # A full disk is the app's trouble, not that of who looks at it: try again in a second.
                logger.warning("status not written", app=name, error=str(error))
            if stop.wait(EVERY_S):
                return

    folder.mkdir(parents=True, exist_ok=True)
    with beside(publish, name=f"live-{name}", daemon=True):
        yield


class Watch:
    """Turns the counters of one app into rates and latencies, by what they were before."""

    def __init__(self, app: App, *, name: str, state_file: Path) -> None:
        self._app = app
        self._name = name
        self._state_file = state_file
        self._count_windows_at = 0.0
        self._started_at = datetime.now(UTC)
        self._first = _samples(name)
        self._past: deque[tuple[float, Samples]] = deque([(time.monotonic(), self._first)])
        self._history: deque[float] = deque(maxlen=HISTORY)

    def look(self) -> Live:
        """The status as of now."""
        self._count_windows()
        now_s, now = time.monotonic(), _samples(self._name)
        before_s, before = self._past[-1]
        documents = ("deltaworks_process_documents_total",)
        if now_s - before_s > EVERY_S / 2:
            self._history.append(round(_grown(now, before, documents) / (now_s - before_s), 1))
            self._past.append((now_s, now))
        while len(self._past) > 2 and now_s - self._past[1][0] >= LATENCY_OVER_S:
            self._past.popleft()
        lag = self._latencies(now, "deltaworks_process_lag_seconds")
        return Live(
            app=self._name,
            pid=os.getpid(),
            started_at=self._started_at,
            at=datetime.now(UTC),
            changes=int(_grown(now, self._first, ("deltaworks_process_changes_total",))),
            documents=int(_grown(now, self._first, documents)),
            changes_per_s=self._rate(now_s, now, "deltaworks_process_changes_total"),
            documents_per_s=self._rate(now_s, now, *documents),
            lag_p50_s=lag[0],
            lag_p99_s=lag[1],
            steps=tuple(
                self._step(now_s, now, step.name, step.kind, step.place)
                for step in (*self._app.steps, *self._app.reactions)
            ),
            sinks=tuple((type(spec).__name__, spec.name) for spec in self._app.sinks),
            history=tuple(self._history),
        )

    def _step(self, now_s: float, now: Samples, name: str, kind: str, place: str) -> LiveStep:
        def count(metric: str, *labels: str) -> int:
            return int(_grown(now, self._first, (f"deltaworks_process_{metric}_total", name, *labels)))

        failed_calls = count("calls", "failed")
        latencies = self._latencies(now, "deltaworks_process_call_seconds", name)
        if latencies == (None, None):
            latencies = self._latencies(now, "deltaworks_process_step_seconds", name)
        breaker = now.get(("deltaworks_process_breaker", name))
        return LiveStep(
            name=name,
            kind=kind,
            place=place,
            taken=count("step", "in"),
            out=count("step", "out"),
            filtered=count("step", "filtered"),
            same=count("step", "same"),
            late=count("step", "late"),
            retried=count("step", "retried"),
            failed=count("step", "failed"),
            per_s=self._rate(now_s, now, "deltaworks_process_step_total", name, "in"),
            calls=count("calls", "ok") + failed_calls,
            failed_calls=failed_calls,
            p50_s=latencies[0],
            p99_s=latencies[1],
            hit_share=self._hit_share(now, name),
            breaker=None if breaker is None else _BREAKER[int(breaker)],
            windows_open=self._windows(now, name, "open"),
            windows_closed=self._windows(now, name, "closed"),
        )

    def _count_windows(self) -> None:
        """Look into the state for windows; where they are so many that it takes long, the less often."""
        step = self._app.windowing
        began_at = time.monotonic()
        if step is None or began_at < self._count_windows_at:
            return
        counts = count_windows(self._state_file, step)
        metrics.WINDOWS.labels(self._name, step.name, "open").set(counts.open)
        metrics.WINDOWS.labels(self._name, step.name, "closed").set(counts.closed)
        self._count_windows_at = began_at + _COUNTING_SHARE * (time.monotonic() - began_at)

    def _windows(self, now: Samples, step: str, state: str) -> int | None:
        count = now.get(("deltaworks_process_windows", step, state))
        return None if count is None else int(count)

    def _rate(self, now_s: float, now: Samples, *name: str) -> float:
        at = next((index for index, (when, _) in enumerate(self._past) if now_s - when <= RATE_OVER_S), -1)
        then_s, then = self._past[at]
        if now_s <= then_s:
            return 0.0
        return round(_grown(now, then, name) / (now_s - then_s), 1)

    def _latencies(self, now: Samples, metric: str, *labels: str) -> tuple[float | None, float | None]:
        """Median and 99th percentile of the last minute, within their buckets by straight lines."""
        then = self._past[0][1]
        prefix = (f"{metric}_bucket", *labels)
        buckets = sorted(
            (float(key[-1]), _grown(now, then, key))
            for key in now
            if key[:-1] == prefix and len(key) == len(prefix) + 1
        )
        return quantile(buckets, 0.5), quantile(buckets, 0.99)

    def _hit_share(self, now: Samples, step: str) -> float | None:
        then = self._past[0][1]
        grown = {
            result: _grown(now, then, ("deltaworks_process_cache_total", step, result))
            for result in ("hit", "negative", "miss", "joined")
        }
        asked = sum(grown.values())
        return round((asked - grown["miss"]) / asked, 4) if asked else None


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Where that share of what a histogram counted lies; `None` where it counted nothing.

    >>> quantile([(0.1, 50), (0.2, 100), (float("inf"), 100)], 0.75)
    0.15
    """
    if not buckets or not buckets[-1][1]:
        return None
    wanted = share * buckets[-1][1]
    index = bisect.bisect_left([count for _, count in buckets], wanted)
    upper, count = buckets[index]
    lower, count_before = buckets[index - 1] if index else (0.0, 0.0)
    if upper == float("inf"):
        return lower
    inside = (wanted - count_before) / (count - count_before) if count > count_before else 1.0
    return round(lower + (upper - lower) * inside, 6)


def _samples(app: str) -> Samples:
    found: dict[tuple[str, ...], float] = {}
    for metric in metrics.APP_METRICS:
        for family in metric.collect():
            for sample in family.samples:
                labels = dict(sample.labels)
                if labels.pop("app") == app:
                    found[(sample.name, *labels.values())] = sample.value
    return found


def _grown(now: Samples, then: Samples, key: tuple[str, ...]) -> float:
    return now.get(key, 0.0) - then.get(key, 0.0)


def _write(path: Path, live: Live) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(live.to_json()), encoding="utf-8")
    draft.replace(path)
