"""The headers of named gaps: what is known of lost groups, so that everything around them still follows.

header read        the same header, its changes gone
only indexed       its place: sequence, offsets, position, times
nothing known      a run of them: the first takes all offsets and the position up to the next known group
                   sequence      6        7        8        9
                   offsets     30-41    41-60    60-60    60-60      7 and 8 are lost; 9 begins at 60
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from deltaworks.log.change_log import GroupHeader
from deltaworks.position import START, Lsn

_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Where a group begins: what ends at the group before."""

    offset: int
    position: Lsn

    @classmethod
    def of(cls, header: GroupHeader) -> Self:
        """Where this group begins."""
        return cls(offset=header.offset, position=header.previous_position)


def gap_headers(
    first: int,
    last: int,
    *,
    known: Mapping[int, GroupHeader],
    places: Mapping[int, Mapping[str, Any]],  # Any: a row of `sealed.GROUPS`
    whole: Mapping[int, object],
    before: GroupHeader | None,
    after: Bound,
    lost: str,
) -> dict[int, GroupHeader]:
    """A header for each of the groups `first` to `last` that is not in `whole`, by sequence.

    `before` is the group before `first`, `None` where it is not kept any more; `after` is where the group after `last`
    begins.
    """
    gaps: dict[int, GroupHeader] = {}
    for sequence in range(first, last + 1):
        header = known.get(sequence)
        if header is None:
            begins = _begin(sequence, before=before, after=_next_bound(sequence, last, known, after))
            if sequence in places:
                header = _at_place(places[sequence], begins, before)
            else:
                header = _unknown(sequence, begins, before, after=_next_bound(sequence, last, known, after))
        if sequence not in whole:
            gaps[sequence] = header = replace(header, lost=header.lost or lost)
        before = header
    return gaps


def _next_bound(sequence: int, last: int, known: Mapping[int, GroupHeader], after: Bound) -> Bound:
    found = next((known[later] for later in range(sequence + 1, last + 1) if later in known), None)
    return after if found is None else Bound.of(found)


def _begin(sequence: int, *, before: GroupHeader | None, after: Bound) -> Bound:
    if before is not None:
        return Bound(offset=before.next_offset, position=before.position)
    # What came before is not kept any more: nothing is known of it but the end of all that is lost.
    return Bound(offset=0, position=START) if sequence == 0 else after


def _at_place(place: Mapping[str, Any], begins: Bound, before: GroupHeader | None) -> GroupHeader:
    position = Lsn(place["position"])
    return replace(
        _unknown(place["sequence"], begins, before, after=begins),
        offset=place["offset"],
        next_offset=place["next_offset"],
        position=position,
        # An index does not say what a group follows; that of the oldest group that is kept is nobody's to compare.
        previous_position=position if before is None and place["sequence"] > 0 else begins.position,
        is_partial=place["is_partial"],
        max_committed_at=place["max_committed_at"],
        appended_at=place["appended_at"],
    )


def _unknown(sequence: int, begins: Bound, before: GroupHeader | None, *, after: Bound) -> GroupHeader:
    # Within a large transaction the position stands still, and moves with its last part.
    is_within = before is not None and before.is_partial and after.position == begins.position
    return GroupHeader(
        sequence=sequence,
        offset=begins.offset,
        next_offset=after.offset,
        epoch=before.epoch if before is not None else 0,
        position=after.position,
        previous_position=begins.position,
        transaction_count=0,
        tables={},
        min_txid=None,
        max_txid=None,
        max_committed_at=None,
        appended_at=before.appended_at if before is not None else _LONG_AGO,
        progress={},
        is_partial=is_within,
    )
