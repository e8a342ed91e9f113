"""The balance of a step: every entity that went in came out, became a document, or was set back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltaworks.process.entity import Entity
from deltaworks.process.fold import Key

if TYPE_CHECKING:
    from deltaworks.process.pipeline import Outcome

LOST = "the entity left no trace in this step; it is processed again, and if that repeats, report it"
"""The fault of an entity that is in none of the three."""


class StepBalance:
    """Taken before a step, asked after it. What went missing is named, so that it is held and not lost."""

    def __init__(self, keys: Sequence[Key], documents: int, setbacks: int) -> None:
        self._keys = keys
        self._documents = documents
        self._setbacks = setbacks

    @classmethod
    def before(cls, entities: Sequence[Entity[Any]], outcome: "Outcome") -> "StepBalance":
        """What a step is about to take, and what others have left already."""
        return cls([entity.key for entity in entities], len(outcome.documents), len(outcome.setbacks))

    def lost(self, entities: Sequence[Entity[Any]], outcome: "Outcome") -> list[Key]:
        """The keys that went in and are nowhere now."""
        seen = {entity.key for entity in entities}
        seen.update(document.key for document in outcome.documents[self._documents :])
        seen.update(setback.key for setback in outcome.setbacks[self._setbacks :])
        return [key for key in self._keys if key not in seen]
