"""Which columns a document is made of, found by trying: change one input value, run the step again, look.

No parser reads the code of a step, so nothing in it can be misread. What the samples never exercise
is missed, which is why a column counts as soon as one of many samples shows it. Direct and indirect
influence look the same: a `role` that decides in which list a name stands is an input of those lists.

    sample ──transform──► document ┐
      │ movie.title changed        ├─ differ in `title`  ⇒  title ← movie.title
      └──────transform──► document ┘

What an enrichment found comes from a service. Its fields count as the columns of the looked-up table
that have their names, and as all columns of it where none has.
"""

import asyncio
import dataclasses
import datetime
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from deltaworks.process.app import App
from deltaworks.process.arrow import compute, table_of, table_of_documents
from deltaworks.process.declared import KEY, TableStep
from deltaworks.process.entity import Entity
from deltaworks.process.shape import fields_of, to_mapping
from deltaworks.process.source import Table
from deltaworks.process.step import STEP_ERRORS, call

Columns = frozenset[tuple[str, str]]
"""Pairs of a table's short name and a column of it."""

LINEAGE_FILE = "lineage.json"
"""In the folder of the app, beside its state."""

SAMPLES = 32
"""Enough that each kind of related row turns up; few enough to take a tenth of a second."""

_LONG_AGO = datetime.date(1903, 5, 17)


def observe(app: App, samples: Sequence[Entity[Any]], *, clients: Mapping[str, Any]) -> Mapping[str, Columns]:
    """The columns behind each field of the app's document, over these entities."""
    return asyncio.run(observe_in_loop(app, samples, clients=clients))


async def observe_in_loop(
    app: App, samples: Sequence[Entity[Any]], *, clients: Mapping[str, Any]
) -> Mapping[str, Columns]:
    """`observe` for a caller that has a running loop."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for sample in samples:
        before = await _document(app, sample, clients)
        if before is None:
            continue
        for name in before:
            found[name] |= set()
        for column, changed in _changed(app, sample):
            after = await _document(app, changed, clients)
            if after is None:
                continue
            for name in before.keys() | after.keys():
                if before.get(name) != after.get(name):
                    found[name] |= column
    return {name: frozenset(columns) for name, columns in found.items()}


def save(lineage: Mapping[str, Columns], file: Path) -> None:
    """Keep what was observed for readers in other processes, merged with what earlier samples showed."""
    earlier = read(file)
    merged = {name: sorted(lineage.get(name, frozenset()) | earlier.get(name, frozenset())) for name in lineage}
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(merged, indent=1), encoding="utf-8")
    draft.replace(file)


def read(file: Path) -> Mapping[str, Columns]:
    """What `save` kept; empty when nothing was observed yet."""
    if not file.exists():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {name: frozenset((table, column) for table, column in columns) for name, columns in kept.items()}


async def _document(app: App, entity: Entity[Any], clients: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value: Any = entity
    try:
        for step in app.making:
            value = _row(step, value, app, clients) if isinstance(step, TableStep) else await call(step, value, clients)
            if value is None:
                return None
    except STEP_ERRORS:  # A step may refuse a value it never meets; that sample says nothing
        return None
    return to_mapping(entity.after if value is entity else value)


def _row(step: TableStep, value: Any, app: App, clients: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a step over tables makes of one row; `None` where it leaves it out."""
    is_entity = isinstance(value, Entity)
    rows = (
        table_of([0], [value.after], app.entity.fields) if is_entity else table_of_documents([0], [to_mapping(value)])
    )
    made = compute(step, rows, clients).rows
    return made.drop_columns([KEY]).to_pylist()[0] if made.num_rows else None


def _changed(app: App, entity: Entity[Any]) -> Iterator[tuple[set[tuple[str, str]], Entity[Any]]]:
    """Each column with the entity as it would be if that column had another value."""
    for column, value in _values(entity.after):
        yield (
            {(app.entity.name.short, column)},
            msgspec.structs.replace(entity, after=_with(entity.after, column, value)),
        )
    for name, rows in entity.related.items():
        for index, row in enumerate(rows):
            for column, value in _values(row):
                others = [*rows[:index], _with(row, column, value), *rows[index + 1 :]]
                yield {(name, column)}, msgspec.structs.replace(entity, related={**entity.related, name: others})
    for step in app.enrichments:
        if step.lookup is not None and step.into in entity.enriched:
            yield from _changed_answer(step.into, step.lookup, entity)


def _changed_answer(
    into: str, lookup: Table[Any], entity: Entity[Any]
) -> Iterator[tuple[set[tuple[str, str]], Entity[Any]]]:
    table = lookup.name.short
    answer = entity.enriched[into]
    if not isinstance(answer, Mapping) or not answer:
        return
    declared = {field.name for field in fields_of(lookup.schema)} if lookup.schema is not None else set()
    for field_name in {name for item in answer.values() for name, _ in _values(item)}:
        changed = {key: _with(item, field_name, dict(_values(item)).get(field_name)) for key, item in answer.items()}
        columns = (
            {(table, field_name)} if not declared or field_name in declared else {(table, each) for each in declared}
        )
        yield columns, msgspec.structs.replace(entity, enriched={**entity.enriched, into: changed})


def _values(row: Any) -> Iterator[tuple[str, Any]]:
    """Each field of a row with a value it does not have."""
    if isinstance(row, Mapping):
        for name, value in row.items():
            yield name, other_than(value)
    elif dataclasses.is_dataclass(row):
        for field in dataclasses.fields(row):
            yield field.name, other_than(getattr(row, field.name))


def _with(row: Any, column: str, value: Any) -> Any:
    if isinstance(row, Mapping):
        return {**row, column: value}
    return dataclasses.replace(row, **{column: value})


def other_than(value: Any) -> Any:
    """A value of the same type that differs; for `None`, a text.

    >>> other_than(7), other_than("a"), other_than([1]), other_than(True)
    (1000010, 'a·', [1, 1], False)
    """
    match value:
        case bool():
            return not value
        case int():
            return value + 1_000_003
        case float():
            return value + 3.0
        case Decimal():
            return value + 3
        case str():
            return value + "·"
        case bytes():
            return value + b"."
        case datetime.datetime():
            return value - datetime.timedelta(days=1)
        case datetime.date():
            return value - datetime.timedelta(days=1)
        case list() | tuple():
            return type(value)([*value, *(value[:1] or ["·"])])
        case None:
            return "·"
        case _:
            return None
