"""The balance of a step: every entity that went in came out, became a document, or was set back.

Numbers are compared after every step, and keys once for a whole run, but for runs of very many.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from deltaworks.process.entity import Entity
from deltaworks.process.fold import Key

if TYPE_CHECKING:
    from deltaworks.process.pipeline import Outcome

_FEW = 5_000
"""More entities than that come of a range that is read in bulk, where looking for each takes a tenth of the time."""

LOST = "the entity left no trace in this step; it is processed again, and if that repeats, report it"
"""The fault of an entity that is in none of the three."""


class Balance:
    """Taken before a step or a run, asked after it. What went missing is named, so that it is held and not lost."""

    def __init__(self, given: Sequence[Entity[Any]], outcome: "Outcome") -> None:
        """What is about to be taken, and what is in the outcome already."""
        self._given = given
        self._documents = len(outcome.documents)
        self._setbacks = len(outcome.setbacks)

    def is_even(self, entities: Sequence[Entity[Any]], outcome: "Outcome") -> bool:
        """Whether as many came out as went in: of one that is missing another would have had to come twice."""
        documents, setbacks = len(outcome.documents) - self._documents, len(outcome.setbacks) - self._setbacks
        return len(self._given) == len(entities) + documents + setbacks

    def is_kept(self, outcome: "Outcome") -> bool:
        """Whether a whole run left each entity in the outcome."""
        return self.is_even((), outcome) and (len(self._given) > _FEW or not self.lost((), outcome))

    def lost(self, entities: Iterable[Entity[Any]], outcome: "Outcome") -> list[Key]:
        """The keys that went in and are nowhere now."""
        seen = {document.key for document in outcome.documents[self._documents :]}
        seen.update([entity.key for entity in entities], [each.key for each in outcome.setbacks[self._setbacks :]])
        if len(seen) == len(self._given):
            # Whatever comes out has the key of one that went in, and no two of those share one.
            return []
        return [key for entity in self._given if (key := entity.key) not in seen]
