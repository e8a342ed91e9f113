"""Transactions that are too large for memory, or have not ended yet: their messages wait in a file each.

    streamed   'S' xid … 'E'   'S' xid … 'E'  ──►  file of the transaction  ──'c'──► replayed
                                                   cut back, or dropped      ◄──'A'──

The server streams a transaction in pieces once it is larger than `logical_decoding_work_mem`, before
it knows whether it will be committed (protocol 2). One that it sends whole is spilled when it
outgrows the receive buffer. The files have no name, so the death of the process removes them; on a file
system that knows only files with names, one can be left that was made a moment before.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deltaworks.capture.postgres.buffer import ReceiveBuffer
from deltaworks.capture.postgres.compiled import Bytes
from deltaworks.capture.postgres.pgoutput import Relation

_PREFIX = "deltaworks-spill-"


def clean_spills(folder: Path) -> None:
    """Make the folder, and remove what a process left there that died; nobody else may be using it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.glob(f"{_PREFIX}*"):
        left.unlink(missing_ok=True)


@dataclass(slots=True, kw_only=True)
class Spill:
    """The frames of one transaction in the order they came, without the descriptions of tables among them.

    Descriptions are kept beside, because one that came in a part that was rolled back still holds
    afterwards: the server does not repeat it.
    """

    xid: int
    has_xid: bool
    """Whether each message carries the id of its part (subtransaction)."""
    folder: Path | None = None
    size: int = 0
    _file: IO[bytes] = field(init=False, repr=False)
    _relations: list[tuple[int, Relation]] = field(default_factory=list)
    _parts: dict[int, int] = field(default_factory=dict)
    """Where each part begins, in that order."""
    _read: int = 0
    _described: int = 0

    def __post_init__(self) -> None:
        # It stays open as long as the transaction; `close` is the end of both.
        self._file = tempfile.TemporaryFile(dir=self.folder, prefix=_PREFIX)  # noqa: SIM115

    def write(self, frames: Bytes) -> None:
        """Add whole frames at the end."""
        self._file.write(frames.data)
        self.size += len(frames)

    def note_part(self, xid: int) -> None:
        """Note that what follows belongs to this part."""
        self._parts.setdefault(xid, self.size)

    def note_relation(self, relation: Relation) -> None:
        """Keep a description that holds for what follows."""
        self._relations.append((self.size, relation))

    def cut(self, xid: int) -> None:
        """Drop a part that was rolled back: all from its beginning, because the parts behind were within it."""
        begins_at = self._parts.get(xid)
        if begins_at is None:
            return
        while self._parts and next(reversed(self._parts.values())) >= begins_at:
            self._parts.popitem()
        self.size = begins_at
        self._file.seek(self.size)
        self._file.truncate()
        self._relations = [(min(at, self.size), relation) for at, relation in self._relations]

    @property
    def is_read(self) -> bool:
        """Whether `read` has given everything."""
        return self._read == self.size and self._described == len(self._relations)

    def rewind(self) -> None:
        """Read from the beginning."""
        self._file.seek(0)
        self._read = self._described = 0

    def next_relation(self) -> Relation | None:
        """A description that comes before the next byte, each once."""
        if self._described < len(self._relations) and self._relations[self._described][0] <= self._read:
            self._described += 1
            return self._relations[self._described - 1][1]
        return None

    def read(self, buffer: ReceiveBuffer) -> None:
        """Fill the buffer up to the next description; after a description all before it has been read."""
        buffer.grow(1)
        free = buffer.free()
        end = self._relations[self._described][0] if self._described < len(self._relations) else self.size
        wanted = min(len(free), end - self._read)
        # A buffered file gives all that is asked for, up to its end.
        count = self._file.readinto(free[:wanted])  # type: ignore[attr-defined]  # binary files have it
        buffer.received(count)
        self._read += count

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
