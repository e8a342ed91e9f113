"""What is wrong with an app: found when it is declared, when its module is loaded, and against the tables there are."""

import typing
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from deltaworks.errors import TerminalError
from deltaworks.process.arrow import check_sql, table_schema
from deltaworks.process.declared import MAKING, Step, TableStep
from deltaworks.process.source import SchemaFault, SchemaMismatchError, Table, schema_faults
from deltaworks.schema import TableSchema

if TYPE_CHECKING:
    from deltaworks.process.program import Program


class AppError(TerminalError):
    """An app is declared in a way that cannot run."""


def check_tables(name: str, key: str, tables: Sequence[Table[Any]]) -> None:
    """Refuse tables that cannot be joined into entities.

    Raises:
        AppError: none, of several sources, without a schema, twice, or with another key than the app's.
    """
    if not tables:
        raise AppError(f"app {name!r} has no tables; the first of sources= holds the entities")
    names = [table.name for table in tables]
    for table in tables:
        if table.source != tables[0].source:
            raise AppError(f"app {name!r} reads sources {tables[0].source!r} and {table.source!r}; one app, one source")
        if table.schema is None:
            raise AppError(f"app {name!r}, table {str(table)!r}: no schema=; declare the columns to read")
        if names.count(table.name) > 1:
            raise AppError(f"app {name!r} lists table {str(table)!r} twice; declare all columns in one schema")
    if tables[0].key not in (None, key):
        raise AppError(f"app {name!r}, table {str(tables[0])!r}: key is {tables[0].key!r}, the app's is {key!r}")


def check_steps(app: "Program") -> None:
    """Refuse what no run can mend.

    Raises:
        AppError: a step asks for a client that is not declared, routes to a sink that is not, or nothing comes of it.
        SqlStepError: DuckDB refuses a query.
    """
    if not app.sinks and not app.reactions:
        raise AppError(f"app {app.name!r} has no sink; add {app.name}.sink(…), or tell of changes with on_change")
    for step in [*app.steps, *app.reactions]:
        for name in step.clients:
            if name not in app.clients:
                known = ", ".join(app.clients) or "none"
                raise _fault(app, step, f"no client {name!r}; known: {known}. Declare one with client")
        if step.kind == "route":
            _check_route(app, step)
    first = next((step for step in app.steps if step.kind in MAKING), None)
    if isinstance(first, TableStep) and first.query is not None:
        # What comes after another step has the columns that it makes, which only running it can tell.
        check_sql(first, table_schema(app.entity.fields, key=pa.int64()))


def check_app(app: "Program", table_schemas: Iterable[TableSchema], *, is_complete: bool) -> None:
    """Compare the declared tables with what is there. `is_complete`: all tables are given, an absent one is a fault.

    Raises:
        SchemaMismatchError: all faults of all tables, one a line.
        AppError, SqlStepError: see `check_steps`.
    """
    check_steps(app)
    faults = _faults(app, table_schemas, is_complete=is_complete)
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise SchemaMismatchError(
            f"app {app.name!r} does not fit source {app.source!r}, {len(faults)} to mend:\n{listing}"
        )


def _faults(app: "Program", table_schemas: Iterable[TableSchema], *, is_complete: bool) -> list[SchemaFault]:
    actual = {schema.name: schema for schema in table_schemas}
    faults: list[SchemaFault] = []
    for table in app.tables:
        if table.name in actual:
            is_keyed_by = table is app.entity or table in app.lookups
            faults += schema_faults(table, actual[table.name], key=table.key or app.key, is_keyed_by=is_keyed_by)
        elif is_complete:
            known = ", ".join(sorted(name.short for name in actual)) or "none"
            faults.append(
                SchemaFault(table=table.name, column="*", declared="a table", actual=f"not captured; known: {known}")
            )
    return faults


def _check_route(app: "Program", step: Step) -> None:
    """Compare the names in a `Literal` return type with the sinks; other types are looked at when it runs."""
    known = [sink.name for sink in app.sinks]
    for name in _literals(typing.get_type_hints(step.function).get("return")):
        if isinstance(name, str) and name not in known:
            raise _fault(app, step, f"no sink {name!r}; known: {', '.join(known)}")


def _literals(declared: Any) -> Iterable[Any]:  # Any: any type may be declared
    if typing.get_origin(declared) is typing.Literal:
        yield from typing.get_args(declared)
    else:
        for inner in typing.get_args(declared):
            yield from _literals(inner)


def _fault(app: "Program", step: Step, fault: str) -> AppError:
    return AppError(f"app {app.name!r}, step {step.name!r} ({step.place}): {fault}")
