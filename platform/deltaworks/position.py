"""Places in a source's own order.

A *position* belongs to the source (PostgreSQL: LSN). A place in our change log is an *offset*, an int.
"""

import re
from typing import Self

import msgspec

from deltaworks.errors import TerminalError

_LSN_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


class MalformedPositionError(TerminalError):
    """A text that should name a position does not."""


# A version is made for every change, in a sixth of the time that a frozen dataclass takes.
class Lsn(msgspec.Struct, frozen=True, order=True, gc=False):
    """A byte position in PostgreSQL's WAL; ordered within one timeline only.

    >>> Lsn.parse("0/16B3748") < Lsn.parse("1/0")
    True
    >>> str(Lsn(0x16B3748))
    '0/16B3748'
    """

    value: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the server's `high/low` hexadecimal form, as in `pg_current_wal_lsn()`."""
        match = _LSN_TEXT.fullmatch(text)
        if match is None:
            raise MalformedPositionError(f"cannot read LSN {text!r}; expected e.g. '0/16B3748'")
        high, low = (int(half, 16) for half in match.groups())
        return cls(high << 32 | low)

    def __str__(self) -> str:
        return f"{self.value >> 32:X}/{self.value & 0xFFFFFFFF:X}"


START = Lsn(0)
"""Before everything: nothing has been captured yet."""


class Version(msgspec.Struct, frozen=True, order=True, gc=False):
    """The identity of a change in its source: commit position, then place in the transaction.

    One position can carry many rows, so the position alone identifies nothing. Sinks use it as
    the external version of a document: a write with a smaller version than the stored one is stale.

    >>> Version(Lsn(7), 1) < Version(Lsn(7), 2) < Version(Lsn(8), 0)
    True
    """

    position: Lsn
    ordinal: int
