"""Audits a log and what its hops took of it: where changes went missing, and which.

    reader's windows ═══ groups of the log ═══ spans that a hop took
            └── lost before the log? ──┴── lost at the hop? ──► sketch ──► keys

A hop is compared with what the *log* holds, not with what the reader saw, so a loss is told once, at the place
where it happened. What an earlier audit has told of is not told again: the hop's windows lack those changes for
ever, and its keys were dumped since.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import pyarrow as pa

from deltaworks.capture.dump import TextKey
from deltaworks.capture.proof import (
    NO_CHANGES,
    NO_TRANSACTION,
    Chain,
    Proof,
    Window,
    WindowKey,
    WindowSet,
    change_hashes,
)
from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import GroupHeader, LogReader, StoredGroup
from deltaworks.log.taken import Taken
from deltaworks.log.verify import check_group
from deltaworks.schema import texts_by_column


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Windows in which a hop has not what came before it, in one run of groups of the log.

    `missing` is what was handed over less what arrived: a negative count says that more arrived. `keys` are the
    keys of those changes by the table's full name; `is_whole` says that they are all named.
    """

    hop: str
    after: int
    up_to: int
    missing: WindowSet
    keys: Mapping[str, tuple[TextKey, ...]] = field(default_factory=dict)
    is_whole: bool = False
    what: str = ""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables with a window that differs."""
        return tuple(sorted({table for table, _ in self.missing.windows}))

    @property
    def count(self) -> int:
        """Changes that are missing or too many, at the least."""
        return sum(abs(window.count) or 1 for window in self.missing.windows.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class HopAudit:
    """One hop: what was handed to it of the windows it has reached, what arrived, and what is on its way to it.

    `retired` spans, and `unproven` groups, are from before what can be compared.
    """

    hop: str
    up_to: int = -1
    handed: WindowSet = field(default_factory=WindowSet)
    arrived: WindowSet = field(default_factory=WindowSet)
    waiting: WindowSet = field(default_factory=WindowSet)
    losses: tuple[Loss, ...] = ()
    retired: int = 0
    unproven: int = 0


def audit_log(
    reader: LogReader,
    *,
    hop: str,
    after: int = -1,
    chain: Chain | None = NO_TRANSACTION,
    known: Mapping[int, WindowSet] | None = None,
) -> HopAudit:
    """Compare every group after `after` with what the reader of the source saw; reads the changes.

    An `after` of -1 stands for the oldest group that is kept. `chain` is that of group `after`; where it is `None`,
    not known, the first group's is taken as it is. `known` has the windows that earlier audits found missing, by the
    sequence before the group.

    Raises:
        CorruptLogError: a group cannot be read at all.
        OffsetRetiredError: groups after `after` are no longer kept.
    """
    oldest = reader.oldest() if after < 0 else None
    if oldest is not None and oldest.sequence > 0:
        after, chain = oldest.sequence - 1, None
    handed, arrived, unproven, losses, up_to = WindowSet(), WindowSet(), 0, [], after
    for group in reader.read(after_sequence=after):
        up_to, proof = group.header.sequence, group.header.proof
        stored = WindowSet.of(group.batches)
        arrived = arrived.merge(stored)
        handed = handed.merge(stored if proof is None else proof.windows)
        if proof is None:
            unproven += 1
        elif group.header.lost is None:
            # What a damage took is told by whoever made a named gap of it.
            missing = _unexplained(proof.windows.subtract(stored), (known or {}).get(up_to - 1))
            what = "" if chain is None or missing.windows else _broken_chain(group, proof, chain)
            if missing.windows or what:
                losses.append(Loss(hop=hop, after=up_to - 1, up_to=up_to, missing=missing, what=what))
        chain = group.header.known_chain
    return HopAudit(hop=hop, up_to=up_to, handed=handed, arrived=arrived, losses=tuple(losses), unproven=unproven)


def audit_hop(
    reader: LogReader,
    spans: Sequence[Taken],
    *,
    hop: str,
    after: int = -1,
    tables: Collection[str] | None = None,
    known: Mapping[int, WindowSet] | None = None,
) -> HopAudit:
    """Compare what a hop took with the log: headers first, and the changes of those spans that differ.

    `after` is the group up to which the hop was compared before, so that `spans` go on there. `tables` are those that
    the hop reads, all of them where left out. `known` has the windows that earlier audits
    found missing, by the sequence that the span is after.
    """
    headers = _headers(reader, after=min((span.after for span in spans), default=after))
    first = headers[0].sequence if headers else 0
    kept = [span for span in spans if span.after >= first - 1 and span.up_to < first + len(headers)]
    told, losses, unproven = known or {}, [], 0
    handed_all = arrived = WindowSet()
    for span in kept:
        inside = headers[span.after + 1 - first : span.up_to + 1 - first]
        unproven += sum(header.proof is None for header in inside)
        handed = _chosen(_seen(reader, span, inside), tables)
        explained = told.get(span.after)
        if _unexplained(handed.subtract(span.windows), explained).windows:
            groups = list(_groups(reader, span))
            stored = Taken.of(_batches(groups, tables), after=span.after, up_to=span.up_to)
            lost = [header for header in inside if header.lost is not None]
            took = _taken_with(lost, stored.windows, span.windows, tables=tables, explained=explained)
            missing = _unexplained(took.subtract(span.windows), explained)
            if missing.windows:
                keys, is_whole = _keys(span, stored, missing, list(_batches(groups, tables)))
                losses.append(
                    Loss(hop=hop, after=span.after, up_to=span.up_to, missing=missing, keys=keys, is_whole=is_whole)
                )
            handed = took
        handed_all, arrived = handed_all.merge(handed), arrived.merge(span.windows)
    reached = kept[-1].up_to if kept else after
    still = [header for header in headers if header.sequence > reached and header.lost is None]
    waiting = [header.proof.windows for header in still if header.proof is not None]
    return HopAudit(
        hop=hop,
        up_to=reached,
        handed=handed_all,
        arrived=arrived,
        waiting=_chosen(_sum(waiting), tables),
        losses=tuple(losses),
        retired=len(spans) - len(kept),
        unproven=unproven,
    )


def keys_of(
    batches: Iterable[ChangeBatch],
    *,
    hashes: Collection[int] | None = None,
    windows: Collection[WindowKey] | None = None,
) -> dict[str, tuple[TextKey, ...]]:
    """The keys of the changes with these hashes, or of all in these windows, by the table's full name; old keys too."""
    wanted = None if hashes is None else np.array(sorted(hashes), np.uint64)
    found: defaultdict[str, dict[TextKey, None]] = defaultdict(dict)
    for batch in batches:
        chosen = np.ones(len(batch), bool) if wanted is None else np.isin(change_hashes(batch), wanted)
        if windows is not None:
            minutes = batch.rows.column("_committed_at").view(pa.int64()).to_numpy() // 60_000_000
            mine = [minute for table, minute in windows if table == str(batch.schema.name)]
            chosen &= np.isin(minutes, mine)
        if places := np.flatnonzero(chosen).tolist():
            rows = batch.rows.take(pa.array(places))
            found[str(batch.schema.name)].update(dict.fromkeys(_key_texts(ChangeBatch(batch.schema, rows))))
    return {table: tuple(keys) for table, keys in found.items()}


def key_text(value: object) -> str:
    """A part of a key as the source reads it."""
    return f"\\x{value.hex()}" if isinstance(value, bytes) else str(value)


def _key_texts(batch: ChangeBatch) -> Iterator[TextKey]:
    rows, names = batch.rows, batch.schema.key
    texts = texts_by_column(rows)
    columns = []
    for name in names:
        values = rows.column(name).to_pylist()
        for place, text in texts.get(name, {}).items():
            values[place] = text
        columns.append(values)
    for key in zip(*columns, strict=True):
        # A truncate has no key; the table is dumped whole for it.
        if None not in key:
            yield tuple(map(key_text, key))
    for old in rows.column("_old_key").to_pylist():
        if old is not None and None not in old.values():
            yield tuple(key_text(old[name]) for name in names)


def _keys(
    span: Taken, stored: Taken, missing: WindowSet, batches: Sequence[ChangeBatch]
) -> tuple[dict[str, tuple[TextKey, ...]], bool]:
    """The keys of what a span lacks, and whether they are all: by the sketch, or else all keys of its windows."""
    difference = stored.sketch.subtract(span.sketch).decode()
    if not difference.is_whole:
        return keys_of(batches, windows=missing.windows), True
    # A change that the hop made up is in no group, so its key is not known.
    return keys_of(batches, hashes=difference.hashes), all(count > 0 for count in difference.hashes.values())


def _taken_with(
    lost: Sequence[GroupHeader],
    stored: WindowSet,
    taken: WindowSet,
    *,
    tables: Collection[str] | None,
    explained: WindowSet | None,
) -> WindowSet:
    """What a hop had to take of a span: all that is stored, and of the lost groups those before the damage.

    Where they are not known that is what it took.
    """
    wanted = stored
    for header in lost:
        if not _unexplained(wanted.subtract(taken), explained).windows:
            return wanted
        if header.proof is None:
            return taken
        wanted = wanted.merge(_chosen(header.proof.windows, tables))
    return stored if _unexplained(wanted.subtract(taken), explained).windows else wanted


def _unexplained(missing: WindowSet, told: WindowSet | None) -> WindowSet:
    """What is missing and was not told of; a hop that began anew may lack nothing of what was told."""
    if told is None:
        return missing
    new = {key: window for key, window in missing.windows.items() if window != told.windows.get(key)}
    return WindowSet(new).subtract(told.of_windows(new))


def _broken_chain(group: StoredGroup, proof: Proof, after: Chain) -> str:
    # Where windows differ the chain differs for the same reason, and the windows say more.
    faults = list(check_group(group, proof, after=after))
    return "" if any(fault.table for fault in faults) else "; ".join(map(str, faults))


def _seen(reader: LogReader, span: Taken, headers: Sequence[GroupHeader]) -> WindowSet:
    """What was handed over in a span: by the headers where they say, else by the changes themselves."""
    seen = _sum(header.proof.windows for header in headers if header.proof is not None)
    silent = {header.sequence for header in headers if header.proof is None and header.tables}
    if silent:
        groups = (group for group in _groups(reader, span) if group.header.sequence in silent)
        seen = _sum([seen, *(WindowSet.of(group.batches) for group in groups)])
    return seen


def _headers(reader: LogReader, *, after: int) -> list[GroupHeader]:
    found = list(takewhile(lambda header: header.sequence > after, reader.headers_backwards()))
    return found[::-1]


def _groups(reader: LogReader, span: Taken) -> Iterator[StoredGroup]:
    return takewhile(lambda group: group.header.sequence <= span.up_to, reader.read(after_sequence=span.after))


def _batches(groups: Iterable[StoredGroup], tables: Collection[str] | None) -> Iterator[ChangeBatch]:
    return (batch for group in groups for batch in group.batches if tables is None or str(batch.schema.name) in tables)


def _chosen(windows: WindowSet, tables: Collection[str] | None) -> WindowSet:
    return windows if tables is None else windows.of_tables(tables)


def _sum(sets: Iterable[WindowSet]) -> WindowSet:
    total: dict[WindowKey, Window] = {}
    for windows in sets:
        for key, window in windows.windows.items():
            total[key] = total.get(key, NO_CHANGES).merge(window)
    return WindowSet(total)
