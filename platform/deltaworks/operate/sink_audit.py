"""Audits a sink: the version of every document that left for it, against what it says it holds.

    ledgers of the app, or of its members ──► newest of each key ─┐
                                                                  ├──► keys that differ ──► once more ──► loss
    sink.versions() ──────────────────────────────────────────────┘

What is newer in the sink is no fault: it left since the ledger was read, or from a member on another machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.capture.proof import Window, WindowSet, text_hashes
from deltaworks.config import Config
from deltaworks.log.audit import Loss
from deltaworks.process.app import App
from deltaworks.process.ledger.ledger import LedgerReader
from deltaworks.process.ledger.left_keys import LeftKeys
from deltaworks.process.place import member_folders
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.sink import SinkReader, SinkSpec, StoredVersion, open_reader

_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkAudit:
    """What a sink holds of what left for it. `is_readable` is `False` where it gives nothing back or may forget.

    `undecided` documents are on their way at this moment, in a sink that keeps no trace of what it deleted: a later
    audit compares them.
    """

    app: str
    sink: str
    documents: int = 0
    is_readable: bool = True
    undecided: int = 0
    loss: Loss | None = None

    @property
    def missing(self) -> int:
        """Documents that are not as they left."""
        return 0 if self.loss is None else sum(map(len, self.loss.keys.values()))


def is_comparable(spec: SinkSpec) -> bool:
    """Whether what a sink lacks of what left for it is a fault."""
    able = spec.capabilities
    return able.can_read_back and not able.may_forget and not able.is_event


def same_sink(name: str, spec: SinkSpec, *, documents: int) -> SinkAudit:
    """Of a sink for which nothing left since it was compared, where it could be."""
    return SinkAudit(app=name, sink=spec.name, documents=documents, is_readable=is_comparable(spec))


class Ledgers:
    """The ledgers of an app: one, or one for each member that ran on this machine. A context manager."""

    def __init__(self, config: Config, app: str) -> None:
        self.config = config
        self.app = app
        folders = member_folders(config.app_folder(app), is_shared=config.app(app).shares is not None)
        self._files = {folder.name: folder / STATE_FILE for folder in folders}
        self._open = ExitStack()
        self.by_member: dict[str, LedgerReader] = {}

    def __enter__(self) -> "Ledgers":
        self.by_member = {name: self._open.enter_context(LedgerReader(file)) for name, file in self._files.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def left(self) -> LeftKeys:
        """What left of every key, as of now."""
        return LeftKeys.of(each.left_tables() for each in self.by_member.values())

    def digest(self) -> str:
        """Another text whenever something left since."""
        return ";".join(each.left() for each in self.by_member.values())

    def is_range_under_way(self) -> bool:
        """Whether more may be in the sinks than the ledgers say."""
        return any(each.is_range_under_way() for each in self.by_member.values())


def audit_sink(app: App, spec: SinkSpec, ledgers: Ledgers, left: LeftKeys) -> SinkAudit:
    """Compare one sink with `left`, which was read before: what leaves meanwhile is newer in the sink.

    Holds the columns of `left` in memory and streams the sink.

    Raises:
        RetryableError: the sink's server is not there now.
    """
    if not is_comparable(spec):
        return SinkAudit(app=ledgers.app, sink=spec.name, is_readable=False)
    documents, undecided = len(left), 0
    # An app that never ran has made no table that could be asked.
    suspects = _suspects(app, spec, ledgers, left) if documents else np.empty(0, np.int64)
    if len(suspects):
        # Once more, as of now: a document may be on its way.
        hashes, left = left.hashes[suspects], ledgers.left()
        suspects = np.intersect1d(_suspects(app, spec, ledgers, left), left.places_of(hashes)[0])
    if len(suspects) and not spec.capabilities.keeps_tombstones:
        on_its_way = _on_its_way(ledgers, left, suspects)
        undecided, suspects = int(on_its_way.sum()), suspects[~on_its_way]
    loss = _loss(ledgers.app, app, spec, left, suspects) if len(suspects) else None
    return SinkAudit(app=ledgers.app, sink=spec.name, documents=documents, undecided=undecided, loss=loss)


def _suspects(app: App, spec: SinkSpec, ledgers: Ledgers, left: LeftKeys) -> npt.NDArray[np.int64]:
    """The places of keys whose document in the sink is not as it left."""
    reader = open_reader(spec, app=ledgers.app, key=app.document_key, config=ledgers.config)
    try:
        return differing(left, reader, sink=spec.name)
    finally:
        reader.close()


def differing(left: LeftKeys, reader: SinkReader, *, sink: str) -> npt.NDArray[np.int64]:
    """The places in `left` of keys whose document a sink lost, reverted, or did not delete."""
    is_in = left.are_in(sink)
    # What is not met below is not there, as it has to be where the document is not for this sink.
    is_fine = ~is_in | left.is_unsure
    for page in _pages(reader.versions()):
        hashes = text_hashes(pa.array([each.key for each in page], pa.string()))
        places, are_known = left.places_of(hashes)
        places = places[are_known]
        positions = np.array([each.version.position.value for each in page], np.uint64)[are_known]
        ordinals = np.array([each.version.ordinal for each in page], np.uint32)[are_known]
        is_deleted = np.array([each.is_deleted for each in page], bool)[are_known]
        is_same = positions == left.positions[places]
        is_newer = (positions > left.positions[places]) | (is_same & (ordinals > left.ordinals[places]))
        is_same &= ordinals == left.ordinals[places]
        is_as_left = np.where(is_in[places], is_same & ~is_deleted, is_deleted)
        is_fine[places] = is_newer | is_as_left | left.is_unsure[places]
    return np.flatnonzero(~is_fine)


def _pages(versions: Iterator[StoredVersion]) -> Iterator[Sequence[StoredVersion]]:
    while page := list(islice(versions, _AT_ONCE)):
        yield page


def _on_its_way(ledgers: Ledgers, left: LeftKeys, suspects: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of these documents may have been deleted for a change that the ledger does not tell of yet."""
    if ledgers.is_range_under_way():
        return np.ones(len(suspects), bool)
    texts = {left.texts[place].as_py(): at for at, place in enumerate(suspects.tolist())}
    found = np.zeros(len(suspects), bool)
    for ledger in ledgers.by_member.values():
        for key, version in ledger.newest(texts):
            found[texts[key]] |= version > left.version(int(suspects[texts[key]]))
    return found


def _loss(name: str, app: App, spec: SinkSpec, left: LeftKeys, suspects: npt.NDArray[np.int64]) -> Loss:
    table = str(app.entity.name)
    minutes, counts = np.unique(left.minutes[suspects], return_counts=True)
    windows = {
        (table, minute): Window(count=count, sum=0, xor=0)
        for minute, count in zip(minutes.tolist(), counts.tolist(), strict=True)
    }
    keys = tuple((left.texts[place].as_py(),) for place in suspects.tolist())
    return Loss(
        hop=f"sink {name}/{spec.name}",
        after=-1,
        up_to=-1,
        missing=WindowSet(windows),
        keys={table: keys},
        is_whole=True,
    )
