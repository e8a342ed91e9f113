"""Where the entities of an app stand: put together out of its ledgers, which may be those of several members."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.capture.proof import Words, text_hashes
from deltaworks.process.ledger.ledger import LedgerReader
from deltaworks.process.ledger.left_keys import IN_ALL, LeftKeys, places_in
from deltaworks.process.sink import key_text

_LEFT, _FILTERED, _GONE, _WAITING, _HELD, _DEAD = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stood:
    """Entities of one minute of their newest change, by where they stand.

    `left` ones have their document in the sinks, `filtered` ones have a row and no document, `gone` ones have no row.
    """

    minute: int
    left: int = 0
    filtered: int = 0
    gone: int = 0
    waiting: int = 0
    held: int = 0
    dead: int = 0

    @property
    def entities(self) -> int:
        """All of them."""
        return self.left + self.filtered + self.gone + self.waiting + self.held + self.dead


def stood(left: LeftKeys, ledgers: Sequence[LedgerReader], *, entity: str, keeps_rows: bool) -> list[Stood]:
    """The entities by the minute of their newest change; `entity` is their table's short name.

    A member of several knows every entity; that one waits there counts for nothing once its change left from another.
    A state that does not keep every row knows those alone that could not leave, and `left` has all others.
    """
    known = _Known.of(ledgers, entity, keeps_rows=keeps_rows, left=left)
    hashes = np.union1d(left.hashes, known.hashes)
    at_left, is_left = left.places_of(hashes)
    at_known, is_known = known.places_of(hashes)
    where = np.full(len(hashes), _LEFT)
    minutes = np.zeros(len(hashes), np.int64)
    if len(left):
        is_nowhere = np.array([not names for names in left.routes], bool)[np.maximum(left.route, 0)]
        kept = np.where((left.route != IN_ALL) & is_nowhere, np.where(left.is_gone, _GONE, _FILTERED), _LEFT)
        where[is_left] = kept[at_left[is_left]]
        minutes[is_left] = left.minutes[at_left[is_left]]
    if len(known.hashes):
        here = at_known[is_known]
        is_gone = ~known.has_row[here] & (known.standings[here] == 0)
        where[is_known] = np.where(is_gone, _GONE, where[is_known])
        where[is_known] = np.where(known.standings[here] > 0, _WAITING - 1 + known.standings[here], where[is_known])
        minutes[is_known] = np.maximum(minutes[is_known], known.minutes[here])
    found = []
    for minute in np.unique(minutes).tolist():
        counts = np.bincount(where[minutes == minute], minlength=6).tolist()
        found.append(
            Stood(
                minute=minute,
                left=counts[_LEFT],
                filtered=counts[_FILTERED],
                gone=counts[_GONE],
                waiting=counts[_WAITING],
                held=counts[_HELD],
                dead=counts[_DEAD],
            )
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Known:
    """The entities that states know, in the order of `hashes`: of each the newest change, and the worst standing."""

    hashes: Words
    minutes: npt.NDArray[np.int64]
    standings: npt.NDArray[np.int64]
    has_row: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, ledgers: Sequence[LedgerReader], entity: str, *, keeps_rows: bool, left: LeftKeys) -> "_Known":
        hash_pieces, number_pieces = [np.empty(0, np.uint64)], [np.empty((0, 5), np.int64)]
        for page in (page for ledger in ledgers for page in ledger.entities(entity, are_clean_told=keeps_rows)):
            hash_pieces.append(text_hashes(pa.array([key_text(key) for key, *_ in page], pa.string())))
            number_pieces.append(np.array([row[1:] for row in page], np.int64))
        hashes, numbers = np.concatenate(hash_pieces), np.concatenate(number_pieces)
        if len(ledgers) > 1 and len(left):
            places, are_left = left.places_of(hashes)
            positions, ordinals = numbers[:, 0].astype(np.uint64), numbers[:, 1]
            is_done = (left.positions[places] > positions) | (
                (left.positions[places] == positions) & (left.ordinals[places] >= ordinals)
            )
            numbers[are_left & is_done, 3] = 0
        order = np.lexsort((numbers[:, 1], numbers[:, 0], hashes))
        hashes, numbers = hashes[order], numbers[order]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        ends = np.concatenate([starts, [len(hashes)]])[1:] - 1
        return cls(
            hashes=hashes[starts],
            minutes=numbers[ends, 2],
            standings=np.maximum.reduceat(numbers[:, 3], starts) if len(starts) else numbers[:, 3],
            has_row=numbers[ends, 4].astype(bool),
        )

    def places_of(self, hashes: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        return places_in(self.hashes, hashes)
