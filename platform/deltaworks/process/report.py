"""What a run of an app did, and how late its documents were."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from deltaworks.position import START, Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """Seconds until a change was durable and visible in every sink: median, 99th percentile, largest.

    Over the streamed changes of the last 100,000 documents; a dump's reads have no commit to be late from.
    """

    count: int = 0
    p50_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Lag":
        """The percentiles of these, nearest rank."""
        ordered = sorted(seconds)
        if not ordered:
            return cls()
        last = len(ordered) - 1
        return cls(
            count=len(ordered),
            p50_s=ordered[last // 2],
            p99_s=ordered[min(last, (99 * len(ordered)) // 100)],
            max_s=ordered[-1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """What a `drain` or `follow` did.

    `entities` were processed, once for each time they were due: `documents` written, `removed` because gone or
    filtered out (`filtered` of them), the rest set back (`retried`: to be tried again). `enriched` counts ids
    that services knew. `held` and `dead` are all that are so now, `incomplete` the changes that a dump has to complete.
    Everything committed at or before `position` is in the sinks, but for the held and the dead.
    `lag` counts from the commit in the source, `log_lag` from the append to the log.
    """

    changes: int = 0
    entities: int = 0
    documents: int = 0
    removed: int = 0
    filtered: int = 0
    enriched: int = 0
    retried: int = 0
    turns: int = 0
    held: int = 0
    dead: int = 0
    incomplete: int = 0
    position: Lsn = START
    lag: Lag = field(default_factory=Lag)
    log_lag: Lag = field(default_factory=Lag)

    @property
    def counts(self) -> dict[str, int]:
        """Every count by its name."""
        return {item.name: value for item in fields(self) if isinstance(value := getattr(self, item.name), int)}

    @property
    def summary(self) -> str:
        """One line for a person."""
        waiting = f", {self.held} held, {self.dead} dead" if self.held or self.dead else ""
        return (
            f"{self.changes:,} changes, {self.entities:,} entities: {self.documents:,} documents, "
            f"{self.removed:,} removed{waiting}; at {self.position}"
        )


@dataclass(slots=True, kw_only=True)
class Tally:
    """The counts of a run as they grow; the names are those of `ProcessReport`."""

    changes: int = 0
    entities: int = 0
    documents: int = 0
    removed: int = 0
    filtered: int = 0
    enriched: int = 0
    retried: int = 0
    turns: int = 0
    incomplete: int = 0
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    log_lags: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))

    @property
    def settled(self) -> int:
        """What got better: changes folded, documents written or removed, transitions taken."""
        return self.changes + self.documents + self.removed + self.turns

    def report(self, *, held: int, dead: int, position: Lsn) -> ProcessReport:
        """The counts as a report."""
        return ProcessReport(
            changes=self.changes,
            entities=self.entities,
            documents=self.documents,
            removed=self.removed,
            filtered=self.filtered,
            enriched=self.enriched,
            retried=self.retried,
            turns=self.turns,
            held=held,
            dead=dead,
            incomplete=self.incomplete,
            position=position,
            lag=Lag.of(self.lags),
            log_lag=Lag.of(self.log_lags),
        )
