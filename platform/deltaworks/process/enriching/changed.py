"""`when=changed(…)`: an enrichment that runs only when one of these columns changed.

    first sight ─────────────► ask, keep the answer beside the columns' values
    columns as they were kept ► the kept answer
    one of them is another ───► ask again, keep that

The answer is kept in the app's state, so it outlives a restart. It is forgotten when the entity is gone or filtered
out, when a looked-up row that it used changes, and by `reprocess`. It is kept as JSON, so it has to be of what JSON
has: None, bool, int, float, str, lists, and dicts with text keys.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltaworks.process.entity import Entity
from deltaworks.process.fold import Key


@dataclass(frozen=True, slots=True)
class Changed:
    """The columns of the entity's own row that an enrichment depends on; make it with `changed`."""

    columns: tuple[str, ...]

    def basis(self, entity: Entity[Any]) -> str:
        """The columns' values as a text that is equal when they are."""
        row = entity.after
        values = row if isinstance(row, Mapping) else {name: getattr(row, name) for name in self.columns}
        return json.dumps([values[name] for name in self.columns], default=str)


class Kept(NamedTuple):
    """An answer as the state keeps it: the columns' values it was asked for, and the answer as JSON."""

    basis: str
    answer: str

    @classmethod
    def of(cls, basis: str, answer: Any) -> "Kept | None":
        """Keep an answer; `None` where JSON would give back another one."""
        is_many = isinstance(answer, Mapping)
        # Ids may be numbers, which JSON has no keys of: pairs keep them.
        plain = list(map(list, answer.items())) if is_many else answer
        return cls(basis, json.dumps([is_many, plain])) if _is_plain(plain) else None

    def read(self) -> Any:  # Any: what a service answered
        """The answer."""
        is_many, plain = json.loads(self.answer)
        return dict(plain) if is_many else plain


def changed(*columns: str) -> Changed:
    """Let an enrichment run only when one of these columns of the entity's row changed.

    Name every column that its `key` reads: as long as they are the same, an earlier answer is reused. At first sight
    there is none, so it runs.

    >>> changed("person_ids", "title")
    Changed(columns=('person_ids', 'title'))
    """
    return Changed(columns)


def reusable(
    when: Changed, entities: Sequence[Entity[Any]], kept: Mapping[Key, Kept]
) -> tuple[dict[Key, Any], list[Entity[Any]]]:
    """The kept answers that still hold, and the entities to ask for."""
    held = {
        entity.key: found.read()
        for entity in entities
        if (found := kept.get(entity.key)) is not None and found.basis == when.basis(entity)
    }
    return held, [entity for entity in entities if entity.key not in held]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if value is None or kind is str or kind is int or kind is float or kind is bool:
        return True
    if kind is list:
        return all(map(_is_plain, value))
    return kind is dict and all(type(key) is str and _is_plain(item) for key, item in value.items())
