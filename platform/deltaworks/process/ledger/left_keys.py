"""Of every key that ever left an app, the newest version and where it went: put together out of its ledgers.

    ledger ──┐ runs, rows
    ledger ──┼──► hash of the key ──► sort ──► the newest of each key ──► LeftKeys
    member ──┘

Columns, because an app may have tens of millions of keys: about 60 bytes each and the text of the key.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deltaworks.capture.proof import Words, text_hashes
from deltaworks.position import Lsn, Version
from deltaworks.process.declared import KEY
from deltaworks.process.sink import key_text

IN_ALL = -1
"""The route of documents that are in every sink; others are places in `LeftKeys.routes`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftKeys:
    """Columns in the order of `hashes`, which are those of `texts`: the keys as `key_text` gives them.

    `routes` has the names of the sinks that a document is in, none of where it was filtered out or is gone. What two
    ledgers say of one version in two ways `is_unsure`: several members made that document, and either may be in a sink.
    """

    hashes: Words
    texts: pa.Array
    positions: Words
    ordinals: npt.NDArray[np.uint32]
    minutes: npt.NDArray[np.int32]
    route: npt.NDArray[np.int32]
    routes: Sequence[frozenset[str]]
    is_gone: npt.NDArray[np.bool_]
    is_unsure: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, ledgers: Iterable[Iterable[pa.Table]]) -> "LeftKeys":
        """Of the tables of several ledgers, each in the order in which documents left; see `left`."""
        pieces, texts, names, number = [], [], {"": 0}, -1
        for number, tables in enumerate(ledgers):
            for table in tables:
                texts.append(key_texts(table.column(KEY)))
                pieces.append((number, table, _routes(table.column("sinks"), names)))
        all_texts = pa.chunked_array(texts, pa.string()).cast(pa.large_string()).combine_chunks()
        hashes = _gathered([text_hashes(each) for each in texts], np.uint64)
        positions = _gathered([table.column("position").to_numpy() for _, table, _ in pieces], np.uint64)
        ordinals = _gathered([table.column("ordinal").to_numpy() for _, table, _ in pieces], np.uint32)
        # Stable: of what has the same version, that which left last stays last.
        order = np.lexsort((ordinals, positions, hashes))
        hashes, positions, ordinals = hashes[order], positions[order], ordinals[order]
        is_last = np.ones(len(order), bool)
        is_last[:-1] = hashes[1:] != hashes[:-1]
        route = _gathered([each for _, _, each in pieces], np.int32)[order]
        is_unsure = np.zeros(len(order), bool)
        if number > 0:
            ledger = _gathered([np.full(len(each), place) for place, _, each in pieces], np.int64)[order]
            is_unsure[1:] = (
                (hashes[1:] == hashes[:-1])
                & (positions[1:] == positions[:-1])
                & (ordinals[1:] == ordinals[:-1])
                & (ledger[1:] != ledger[:-1])
                & (route[1:] != route[:-1])
            )
        minutes = _gathered([table.column("minute").to_numpy() for _, table, _ in pieces], np.int32)
        is_gone = _gathered(
            [table.column("is_gone").to_numpy(zero_copy_only=False) for _, table, _ in pieces], np.bool_
        )
        return cls(
            hashes=hashes[is_last],
            texts=all_texts.take(pa.array(order[is_last])),
            positions=positions[is_last],
            ordinals=ordinals[is_last],
            minutes=minutes[order][is_last],
            route=route[is_last],
            routes=[frozenset(filter(None, each.split(","))) for each in names],
            is_gone=is_gone[order][is_last],
            is_unsure=is_unsure[is_last],
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def places_of(self, hashes: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Where keys with these hashes are, and whether they are there at all."""
        return places_in(self.hashes, hashes)

    def are_in(self, sink: str) -> npt.NDArray[np.bool_]:
        """Which documents have to be in a sink."""
        has_sink = np.array([sink in names for names in self.routes], bool)
        is_in: npt.NDArray[np.bool_] = (self.route == IN_ALL) | has_sink[np.maximum(self.route, 0)]
        return is_in

    def version(self, place: int) -> Version:
        """The version that left last of a key."""
        return Version(Lsn(int(self.positions[place])), int(self.ordinals[place]))


def places_in(known: Words, wanted: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each of `wanted` is in `known`, which ascends, and whether it is there at all."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return places, known[places] == wanted


def key_texts(keys: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Keys as `key_text` gives them."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    if pa.types.is_integer(keys.type) or pa.types.is_string(keys.type):
        return keys.cast(pa.string())
    return pa.array([key_text(each) for each in keys.to_pylist()], pa.string())


def _routes(sinks: pa.ChunkedArray, names: dict[str, int]) -> npt.NDArray[np.int32]:
    """The places of routes in `names`, which gets those that are new."""
    column = sinks.combine_chunks()
    known = [names.setdefault(each, len(names)) for each in column.dictionary.to_pylist()]
    indices = column.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    routes: npt.NDArray[np.int32] = np.array([*known, IN_ALL], np.int32)[indices]
    return routes


def _gathered(pieces: Sequence[npt.NDArray[Any]], kind: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *pieces])
