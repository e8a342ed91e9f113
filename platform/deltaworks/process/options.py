"""What may be asked of an enrichment: the options that stand on its decorator, checked when the app loads."""

from collections.abc import Iterator, Sequence
from typing import Literal

from deltaworks.process.enriching.breaker import Breaker
from deltaworks.process.enriching.cache import Ttl
from deltaworks.process.enriching.changed import Changed

Partial = Literal["unknown", "retry"]
"""What it means that a service left out an id: it does not know it, or it answered less than it was asked."""


def number_faults(**numbers: float | None) -> Iterator[str]:
    """Those that are given and not more than 0."""
    for name, value in numbers.items():
        if value is not None and value <= 0:
            yield f"{name} must be more than 0, got {value!r}"


def option_faults(
    *, breaker: Breaker | None, cache: Ttl | None, partial: str, when: Changed | None, columns: Sequence[str]
) -> Iterator[str]:
    """What is wrong with the options of an enrichment whose entity has these columns."""
    if breaker is not None:
        yield from number_faults(**{"breaker.failures": breaker.failures, "breaker.open_s": breaker.open_s})
    if cache is not None:
        yield from number_faults(**{"cache.seconds": cache.seconds, "cache.max_items": cache.max_items})
        if cache.unknown_s < 0:
            yield f"cache.negative_s must not be less than 0, got {cache.unknown_s!r}"
    if partial not in ("unknown", "retry"):
        yield f"partial must be 'unknown' or 'retry', got {partial!r}"
    if when is not None:
        known = ", ".join(columns)
        if not when.columns:
            yield f"changed() needs at least one column; known: {known}"
        for column in when.columns:
            if column not in columns:
                yield f"no column {column!r} is declared of the entity; known: {known}"
