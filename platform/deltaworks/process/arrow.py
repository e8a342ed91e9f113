"""Steps over many entities at once: Arrow tables in and out, written in Python or in DuckDB SQL.

entities ──► table: _key, columns ──► step ──► table: _key, columns ──► documents
                                       │ raised
                                       └► halved, until the rows at fault stand alone
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.errors import TerminalError
from deltaworks.process.declared import KEY, TableStep
from deltaworks.process.direct.places import Integers, places_of
from deltaworks.process.shape import Field, arrow_type
from deltaworks.process.step import STEP_ERRORS, StepFault, fault_of

Key = int | str

_NARROWING_CALLS = 128
"""Failed calls that one run may spend on finding the rows at fault."""


class TableStepError(TerminalError):
    """An `arrow` or `sql` step gave back a table that no documents can be made of."""


class SqlStepError(TerminalError):
    """DuckDB refuses the query of an `sql` step."""


@dataclass(slots=True, kw_only=True)
class Computed:
    """What a step made of a table; `faults` are the rows that it cannot be run on, by key.

    `places` says of which row of the table each row was made, where that was found out.
    """

    rows: pa.Table
    places: Integers | None = None
    faults: dict[Key, StepFault] = field(default_factory=dict)


def table_schema(fields: Sequence[Field], *, key: pa.DataType) -> pa.Schema:
    """The columns of the table that a step is given: `_key`, then the declared ones."""
    columns = [pa.field(item.name, arrow_type(item.type, where=item.name)) for item in fields]
    return pa.schema([pa.field(KEY, key), *columns])


def table_of(keys: Sequence[Key], records: Sequence[Any], fields: Sequence[Field]) -> pa.Table:
    """A table of rows as the app declares them; null where a column holds a text its type cannot say."""
    schema = table_schema(fields, key=key_type(keys))
    columns = [pa.array(keys, schema.field(0).type)]
    for column in list(schema)[1:]:
        name = column.name
        is_mapping = bool(records) and isinstance(records[0], Mapping)
        values = [record[name] for record in records] if is_mapping else [getattr(each, name) for each in records]
        columns.append(_array(values, column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def table_of_documents(keys: Sequence[Key], bodies: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table of documents, its types inferred; a field that only some have is null in the others."""
    names = list(dict.fromkeys(name for body in bodies for name in body))
    columns = {name: pa.array([body.get(name) for body in bodies]) for name in names}
    return pa.table({KEY: pa.array(keys, key_type(keys)), **columns})


def key_type(keys: Sequence[Key]) -> pa.DataType:
    """The type of `_key`."""
    return pa.string() if keys and isinstance(keys[0], str) else pa.int64()


def compute(step: TableStep, rows: pa.Table, clients: Mapping[str, Any]) -> Computed:
    """Run a step; rows that make it raise are found by halving."""
    return _Computing(step=step, clients=clients).run(rows)


@dataclass(slots=True, kw_only=True)
class _Computing:
    step: TableStep
    clients: Mapping[str, Any]
    failures_left: int = _NARROWING_CALLS

    def run(self, rows: pa.Table) -> Computed:
        if rows.num_rows == 0:
            return Computed(rows=rows)
        try:
            return self._call(rows)
        except STEP_ERRORS as error:
            fault = fault_of(self.step, error)
        self.failures_left -= 1
        if rows.num_rows > 1 and self.failures_left > 0:
            half = rows.num_rows // 2
            return _together(self.run(rows.slice(0, half)), self.run(rows.slice(half)))
        # Most of many rows are innocent: they wait and come again, and the next run looks further.
        fault = fault if rows.num_rows == 1 else replace(fault, may_pass=True)
        return Computed(rows=rows.slice(0, 0), faults=dict.fromkeys(rows.column(KEY).to_pylist(), fault))

    def _call(self, rows: pa.Table) -> Computed:
        made = self.step.function(rows, **{name: self.clients[name] for name in self.step.clients})
        if isinstance(made, pa.RecordBatch):
            made = pa.Table.from_batches([made])
        return Computed(rows=made, places=_checked_places(self.step, rows, made))


def sql_function(query: str, *, table: str) -> Callable[[pa.Table], pa.Table]:
    """The query as the function of an `arrow` step; it can reach nothing but the table it is given."""
    opened: list[duckdb.DuckDBPyConnection] = []

    def run(rows: pa.Table) -> pa.Table:
        if not opened:
            settings: dict[str, str | bool | int | float | list[str]] = {
                "enable_external_access": "false",
                "threads": "1",
                "autoinstall_known_extensions": "false",
            }
            opened.append(duckdb.connect(":memory:", config=settings))
        [connection] = opened
        connection.register(table, rows)
        try:
            return connection.execute(query).to_arrow_table()
        finally:
            connection.unregister(table)

    return run


def check_sql(step: TableStep, schema: pa.Schema) -> None:
    """Run a query over no rows.

    Raises:
        SqlStepError: DuckDB refuses it, or `_key` is not among what it selects.
    """
    try:
        made = step.function(schema.empty_table())
    except duckdb.Error as error:
        raise SqlStepError(f"step {step.name!r} ({step.place}): {error}") from error
    if KEY not in made.schema.names:
        raise SqlStepError(
            f"step {step.name!r} ({step.place}): it selects {', '.join(made.schema.names)}; select {KEY} too, "
            "which says whose document a row is"
        )


def _checked_places(step: TableStep, rows: pa.Table, made: Any) -> Integers | None:
    """Where the keys of `made` are among those of `rows`, if that was found out by the way."""
    if not isinstance(made, pa.Table):
        raise TableStepError(f"returned {type(made).__name__}, expected an Arrow table ({step.place})")
    if KEY not in made.schema.names:
        raise TableStepError(f"returned a table without {KEY}, it has {', '.join(made.schema.names)} ({step.place})")
    keys = made.column(KEY)
    if (places := places_of(keys, rows.column(KEY))) is not None:
        return places
    if made.num_rows > rows.num_rows or pc.count_distinct(keys).as_py() < made.num_rows:
        raise TableStepError(f"returned a key twice; a row is made of one row ({step.place})")
    if not pc.all(pc.is_in(keys, rows.column(KEY).combine_chunks()), min_count=0).as_py():
        raise TableStepError(f"returned a key that it was not given ({step.place})")
    return None


def _together(one: Computed, other: Computed) -> Computed:
    if not (one.rows.num_rows and other.rows.num_rows):
        rows = one.rows if one.rows.num_rows else other.rows
    else:
        rows = pa.concat_tables([one.rows, other.rows], promote_options="permissive")
    return Computed(rows=rows, faults=one.faults | other.faults)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([_or_null(value, kind) for value in values], kind)


def _or_null(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
