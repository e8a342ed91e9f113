"""How far a source was audited, so that the next look reads only what came since.

    home/audit/<source>/mark    one small file, replaced whole

What was audited was clean, or is an incident that is kept for itself: either way it need not be read again. A hop
that began anew is not the one that was audited, which its digest tells, and is then read from its start.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from deltaworks.capture.proof import NO_TRANSACTION, Chain
from deltaworks.config import Config
from deltaworks.log.change_log import LogReader, OffsetRetiredError
from deltaworks.log.registry import open_reader
from deltaworks.log.taken import Taken

_FILE = "mark"


@dataclass(frozen=True, slots=True, kw_only=True)
class HopMark:
    """A hop was compared up to group `up_to`; `digest` is of what it was then."""

    up_to: int = -1
    digest: str = ""


NOTHING_AUDITED = HopMark()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditMark:
    """`offset` of the source's log, the hops by name, and of each sink what had left for it when it was compared."""

    offset: int = 0
    hops: Mapping[str, HopMark] = field(default_factory=dict)
    sinks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, source: str) -> Self:
        """The mark of the newest audit; one that says nothing before the first, or where it cannot be read."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            stored = json.loads(_path(config, source).read_text(encoding="utf-8"))
            hops = {name: HopMark(up_to=up_to, digest=digest) for name, (up_to, digest) in stored["hops"].items()}
            return cls(offset=stored["offset"], hops=hops, sinks=stored["sinks"])
        return cls()

    def save(self, config: Config, source: str) -> None:
        """Replace the mark. One that is lost costs a longer look, so it is not synced."""
        path = _path(config, source)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        hops = {name: [hop.up_to, hop.digest] for name, hop in self.hops.items()}
        # Two audits may run in one process, each in a thread.
        draft = path.with_name(f"{_FILE}.{os.getpid()}.{threading.get_ident()}")
        draft.write_text(json.dumps({"offset": self.offset, "hops": hops, "sinks": dict(self.sinks)}), encoding="utf-8")
        draft.replace(path)


def unaudited(config: Config, source: str) -> int:
    """Changes of a source's log that no audit has seen yet; a log that began anew counts whole."""
    mark, end = AuditMark.read(config, source), open_reader(config, source).end()
    return end.offset - mark.offset if end.offset >= mark.offset else end.offset


def log_start(reader: LogReader, mark: HopMark) -> tuple[int, Chain | None]:
    """The group of a log after which an audit goes on, and the chain there where it is known.

    That of the mark, where it is the same log, or else the one before the oldest that is kept.
    """
    if mark.up_to >= 0 and mark == log_mark(mark.up_to, chain := chain_at(reader, mark.up_to)):
        return mark.up_to, chain
    oldest = reader.oldest()
    return (-1, NO_TRANSACTION) if oldest is None or oldest.sequence == 0 else (oldest.sequence - 1, None)


def log_mark(up_to: int, chain: Chain | None) -> HopMark:
    """The mark of a log that was compared up to a group, by the chain there; one that says nothing without it."""
    return NOTHING_AUDITED if chain is None else HopMark(up_to=up_to, digest=_digest(chain.to_json()))


def chain_at(reader: LogReader, sequence: int) -> Chain | None:
    """The chain up to and with a group; `None` where the log does not have it, or that is lost."""
    if sequence < 0:
        return NO_TRANSACTION
    if sequence > reader.end().sequence:
        return None
    try:
        group = next(iter(reader.read(after_sequence=sequence - 1, max_changes=1)))
    except OffsetRetiredError:
        return None
    return group.header.known_chain


def fresh_spans(spans: Sequence[Taken], mark: HopMark) -> list[Taken]:
    """The spans that were not compared yet, or that were others then."""
    done = [span for span in spans if span.up_to <= mark.up_to]
    return list(spans[len(done) :]) if done and mark == span_mark(done) else list(spans)


def span_mark(spans: Sequence[Taken]) -> HopMark:
    """The mark of spans that were compared whole."""
    if not spans:
        return NOTHING_AUDITED
    return HopMark(up_to=spans[-1].up_to, digest=_digest([span.to_json() for span in spans]))


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _path(config: Config, source: str) -> Path:
    return config.home / "audit" / source / _FILE
