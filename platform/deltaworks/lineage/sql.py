"""Column lineage of one SELECT, read from its text.

    select m.title, count(*) as credits from lake.staging.stg_movie m join …
    title   ← lake.staging.stg_movie.title
    credits ← nothing: it counts rows, and rows are no column

Only what a value is computed from counts here; filters, joins and grouping influence rows and are
not yet told. A statement that cannot be parsed gives all columns of all its inputs, marked as a
guess: too much is a nuisance, too little is a trap.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.lineage import lineage
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import build_scope

Relation = tuple[str, str, str]
"""Catalogue, schema and name of a table or view."""

_NAME = re.compile(r'"?(\w+)"?\."?(\w+)"?\."?(\w+)"?')


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnLineage:
    """For each output column the (relation, column) pairs it is computed from; `is_guess` where parsing failed."""

    columns: Mapping[str, frozenset[tuple[Relation, str]]]
    is_guess: bool


def column_lineage(
    statement: str, *, relations: Mapping[Relation, Sequence[str]], outputs: Sequence[str], dialect: str = "duckdb"
) -> ColumnLineage:
    """Lineage of `outputs`, the columns of the SELECT `statement` over `relations` (their columns in order)."""
    schema: dict[str, Any] = {}
    for (catalogue, namespace, name), columns in relations.items():
        schema.setdefault(catalogue, {}).setdefault(namespace, {})[name] = dict.fromkeys(columns, "text")
    try:
        qualified = qualify(sqlglot.parse_one(statement, dialect=dialect), schema=schema, dialect=dialect)
        scope = build_scope(qualified)
        if scope is None:
            return _everything(statement, relations, outputs)
        found = {
            column: frozenset(_leaves(lineage(column, qualified, schema, scope=scope, dialect=dialect), relations))
            for column in outputs
        }
    except (SqlglotError, ValueError, KeyError):
        return _everything(statement, relations, outputs)
    return ColumnLineage(columns=found, is_guess=False)


def _leaves(root: Any, relations: Mapping[Relation, Sequence[str]]) -> Iterator[tuple[Relation, str]]:  # Any: untyped
    for node in root.walk():
        table = node.expression
        if node.downstream or not isinstance(table, exp.Table):
            continue
        relation = (table.catalog, table.db, table.name)
        column = node.name.rpartition(".")[2].strip('"')
        if column in relations.get(relation, ()):
            yield relation, column


def _everything(statement: str, relations: Mapping[Relation, Sequence[str]], outputs: Sequence[str]) -> ColumnLineage:
    """All columns of all relations that the text names."""
    named = {relation for relation in _NAME.findall(statement) if relation in relations}
    inputs = frozenset((relation, column) for relation in named for column in relations[relation])
    return ColumnLineage(columns=dict.fromkeys(outputs, inputs), is_guess=True)
