"""Times as the log has them."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def from_epoch_us(microseconds: int) -> datetime:
    """A time given in microseconds since 1970, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)
