"""The reads of a dump: the one that another thread is at, and the chunk that waits for its mark."""

from concurrent.futures import Future
from dataclasses import dataclass

from deltaworks.capture.dump import DumpState, TextKey
from deltaworks.capture.source import Chunk, Source
from deltaworks.errors import InvariantError
from deltaworks.log.dump_parts import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What is asked of the source before a table's first chunk."""

    last_key: TextKey | None
    estimated_rows: int | None


@dataclass(slots=True, kw_only=True)
class Read:
    """A read that another thread is at; `repaired` are the keys of a repair read. Nobody waits for a dropped one."""

    part: Part
    repaired: tuple[TextKey, ...] | None
    future: Future[Chunk | Begun]
    began_at: float
    is_dropped: bool = False


@dataclass(slots=True, kw_only=True)
class Flight:
    """A chunk that was read and waits for its mark."""

    part: Part
    chunk: Chunk
    mark: str
    repaired: tuple[TextKey, ...] | None


def read_next(source: Source, part: Part, repaired: tuple[TextKey, ...] | None) -> Chunk | Begun:
    """Read what comes next of a part; runs in the reading thread, on a copy of the part."""
    cursor = part.cursor
    if repaired is not None:
        return source.rows(part.table, keys=repaired)
    if cursor.state is DumpState.WAITING:
        if part.keys:
            return Begun(last_key=part.keys[-1], estimated_rows=len(part.keys))
        return Begun(last_key=source.last_key(part.table), estimated_rows=source.estimated_rows(part.table))
    if part.keys:
        return source.rows(part.table, keys=part.next_keys())
    if cursor.up_to_key is None:
        raise InvariantError(f"cannot go on with the dump of {part.table}: its progress has no last key")
    return source.chunk(
        part.table, after_key=cursor.after_key, up_to_key=cursor.up_to_key, limit=part.pace.limit, where=part.where
    )
