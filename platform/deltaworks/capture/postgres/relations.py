"""The tables that the server has described in the stream, and the slots under which changes refer to their shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.compiled import Ints, Longs
from deltaworks.capture.postgres.logical_messages import MessageShape
from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.shape import Shape
from deltaworks.schema import TableSchema

Describe = Callable[[Relation], TableSchema | None]
"""Gives the schema of a relation, or `None` for a table that is not captured."""


@dataclass(slots=True)
class Relations:
    """Learns from descriptions; each holds for the changes behind it, until the next one of that table."""

    describe: Describe
    shapes: list[Shape | MessageShape] = field(default_factory=list)
    """By slot. A shape that was replaced keeps its slot, because changes before may refer to it."""
    ids: Longs = field(default_factory=lambda: np.full(8, -1, np.int64))
    slots: Ints = field(default_factory=lambda: np.zeros(8, np.int32))
    """With `ids`: what `scan.slot_of` looks into."""
    _known: dict[int, Relation] = field(default_factory=dict)
    _slot_of: dict[int, int] = field(default_factory=dict)
    _message_slot: int = scan.UNKNOWN

    @property
    def message_slot(self) -> int:
        """The slot of messages that are no rows."""
        if self._message_slot == scan.UNKNOWN:
            self._message_slot = len(self.shapes)
            self.shapes.append(MessageShape())
        return self._message_slot

    def learn(self, relation: Relation) -> None:
        """Take note of a description."""
        # The server repeats itself, e.g. after ANALYZE. Under identity full the message does not show the key.
        if self._known.get(relation.id) == relation and relation.identity != "f":
            return
        schema = self.describe(relation)
        slot = self._slot_of.get(relation.id, scan.NOT_CAPTURED)
        if schema is None:
            slot = scan.NOT_CAPTURED
        elif slot < 0 or self.shapes[slot].schema != schema:
            slot = len(self.shapes)
            self.shapes.append(Shape(schema))
        self._known[relation.id] = relation
        self._slot_of[relation.id] = slot
        self._lay_out()

    def known(self, relation_id: int) -> Relation | None:
        """The description that holds now."""
        return self._known.get(relation_id)

    def slot(self, relation_id: int) -> int:
        """The slot of a relation, `scan.NOT_CAPTURED`, or `scan.UNKNOWN` when it was never described."""
        return self._slot_of.get(relation_id, scan.UNKNOWN)

    def _lay_out(self) -> None:
        # At most half of the places are in use, so that a search soon meets an empty one.
        size = max(8, 1 << (2 * len(self._slot_of)).bit_length())
        self.ids, self.slots = np.full(size, -1, np.int64), np.zeros(size, np.int32)
        for relation_id, slot in self._slot_of.items():
            place = relation_id * scan.HASH_FACTOR & size - 1
            while self.ids[place] >= 0:
                place = place + 1 & size - 1
            self.ids[place], self.slots[place] = relation_id, slot
