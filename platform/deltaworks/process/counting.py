"""What a runner has done, counted once for its report, its metrics and its log."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

import structlog

from deltaworks.process import metrics
from deltaworks.process.fold import At, Key
from deltaworks.process.pipeline import Outcome
from deltaworks.process.report import Tally
from deltaworks.process.state import State
from deltaworks.process.waiting import Standing

logger = structlog.get_logger(__name__)


class Counting:
    """Counts for one app; `tally` is begun anew with every run."""

    def __init__(self, name: str, *, state: State) -> None:
        self.tally = Tally()
        self._name = name
        self._state = state
        self._arrivals: dict[Key, tuple[int, datetime]] = {}
        self._has_standing = True

    def changes(self, count: int) -> None:
        """Count changes of the log that were taken."""
        self.tally.changes += count
        metrics.CHANGES.labels(self._name).inc(count)

    def outcome(self, outcome: Outcome, entity_count: int) -> None:
        """Count what was made of entities, once it is settled."""
        tally = self.tally
        tally.entities += entity_count
        made, removed = outcome.counts()
        tally.documents += made
        tally.removed += removed
        tally.filtered += outcome.filtered
        tally.enriched += outcome.enriched
        tally.retried += sum(setback.next_try is not None for setback in outcome.setbacks)
        metrics.DOCUMENTS.labels(self._name).inc(made + removed)
        # One line for each fault, not for each entity: a service that is down sets back thousands.
        faulty = Counter((item.step, item.error, item.next_try is None) for item in outcome.setbacks)
        for (step, error, is_dead), count in faulty.items():
            logger.warning(
                "entities are dead letters" if is_dead else "entities wait",
                app=self._name,
                step=step,
                error=error,
                count=count,
            )
        if outcome.setbacks or self._has_standing:
            counts = self._state.counts()
            self._has_standing = bool(counts[Standing.HELD] or counts[Standing.DEAD])
            for standing in (Standing.HELD, Standing.DEAD):
                metrics.STANDING.labels(self._name, standing.name.lower()).set(counts[standing])

    def arrivals(self, touched: Mapping[Key, At], appended_at: datetime) -> None:
        """Remember since when a document is due; a dump's reads have no commit to be late from."""
        for key, at in touched.items():
            if not at.is_read:
                self._arrivals.setdefault(key, (at.committed_at, appended_at))

    def departures(self, keys: Sequence[Key]) -> None:
        """Take how late the documents of these keys became durable: now."""
        if not self._arrivals:
            return
        found = [arrival for key in keys if (arrival := self._arrivals.pop(key, None)) is not None]
        self.lags([at / 1e6 for at, _ in found], [at.timestamp() for _, at in found])

    def lags(self, committed_at: Sequence[float], appended_at: Sequence[float]) -> None:
        """Take changes that were committed and appended then, in seconds since 1970, and are durable now."""
        now = time.time()
        self.tally.lags.extend(now - at for at in committed_at)
        self.tally.log_lags.extend(now - at for at in appended_at)
        histogram = metrics.LAG.labels(self._name)
        for at in committed_at:
            histogram.observe(now - at)
