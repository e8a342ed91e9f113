"""How long to wait after a failure, and after how many to give up."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long a key waits after its n-th failed try: doubling from `first_s` up to `max_s`, with jitter.

    `attempts`: after that many a key is a dead letter; for ever when left out.

    >>> 0.2 <= Backoff(first_s=0.1, max_s=5.0).delay_s(3) <= 0.4
    True
    """

    first_s: float = 0.2
    max_s: float = 30.0
    attempts: int | None = None

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait after failed try `attempt`, counted from 1; half to whole of the full wait."""
        full = min(self.max_s, self.first_s * 2.0 ** min(attempt - 1, 32))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, protects nothing
