"""Runs suites of expectations on the lake, with Great Expectations 1.x.

All suites of a run see one version of the lake: they are read in one transaction, so what passed
is what can be released (`SuiteResult.version`). Only the columns that a suite needs are read.

Great Expectations is imported when the first suite runs (5 to 10 s, once per process). Its usage
statistics are switched off in the context, which is in memory only: nothing is sent or written.
Results carry counts and sentences, never rows.
"""

import difflib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb

from deltaworks.errors import TerminalError
from deltaworks.gate.suite import Expectation, Suite, SuiteFileError, load_suites
from deltaworks.store.lake import Lake, quoted

__all__ = ["ExpectationResult", "Suite", "SuiteFileError", "SuiteResult", "load_suites", "run_suites"]

_COLUMN_ARGUMENTS = ("column", "column_A", "column_B", "column_list")
_WITHOUT_COLUMNS = ("expect_table_row_count_to_equal", "expect_table_row_count_to_be_between")


class UnusableExpectationError(TerminalError):
    """An expectation is not known, or its arguments do not fit; the message lists all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectationResult:
    """One expectation's outcome.

    `observed` is a figure of the whole column or table, where the expectation is about one;
    `unexpected_count` counts values, where it is about each. `sentence` says what was found; it has
    no row data.
    """

    expectation: str
    column: str | None
    is_success: bool
    observed: float | None
    unexpected_count: int | None
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """One suite's outcome on one version of the lake."""

    name: str
    data: str
    is_success: bool
    is_blocking: bool
    version: int
    row_count: int
    results: tuple[ExpectationResult, ...]
    took_s: float

    @property
    def failures(self) -> tuple[str, ...]:
        """The sentences of what failed, each once."""
        return tuple(dict.fromkeys(result.sentence for result in self.results if not result.is_success))


def run_suites(lake: Lake, suites: Sequence[Suite]) -> tuple[SuiteResult, ...]:
    """Run suites on the newest version of the lake, in their order.

    A suite whose table or column is not there fails; the others run all the same.

    Raises:
        UnusableExpectationError: a name Great Expectations does not know, or arguments it does not take.
    """
    if not suites:
        return ()
    with _quiet():
        engine = _Engine()
        prepared = engine.prepare(suites)
        with _one_version(lake) as version:
            return tuple(_run(lake, suite, engine, made, version) for suite, made in zip(suites, prepared, strict=True))


class _Engine:
    """Great Expectations, imported and configured."""

    def __init__(self) -> None:
        import great_expectations as gx  # noqa: PLC0415  # seconds; only who runs suites pays
        from great_expectations.data_context.types.base import (  # noqa: PLC0415
            DataContextConfig,
            InMemoryStoreBackendDefaults,
            ProgressBarsConfig,
        )
        from great_expectations.expectations import registry  # noqa: PLC0415

        self._gx = gx
        self._registry = registry
        context = gx.get_context(
            mode="ephemeral",
            project_config=DataContextConfig(
                analytics_enabled=False,
                progress_bars=ProgressBarsConfig(globally=False),
                store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            ),
        )
        self._source = context.data_sources.add_pandas("lake")

    def prepare(self, suites: Sequence[Suite]) -> list[list[Any]]:  # Any: Great Expectations has no usable types
        """Its own expectation objects for each suite."""
        faults: list[str] = []
        prepared = [
            [self._make(suite, at, declared, faults) for at, declared in enumerate(suite.expectations)]
            for suite in suites
        ]
        if faults:
            listing = "\n".join(f"  - {fault}" for fault in faults)
            raise UnusableExpectationError(f"cannot run the expectations, {len(faults)} to mend:\n{listing}")
        return prepared

    def validate(self, name: str, rows: Any, expectations: Iterable[Any]) -> dict[int, Any]:  # Any: as above
        """Validate a data frame; outcomes by the place of their expectation in the suite."""
        asset = self._source.add_dataframe_asset(name)
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": rows})
        suite = self._gx.ExpectationSuite(name=name, expectations=list(expectations))
        outcome = batch.validate(suite, result_format={"result_format": "BASIC", "partial_unexpected_count": 0})
        # It sorts outcomes its own way; the place travels in the expectation's notes.
        return {result.expectation_config.meta["place"]: result for result in outcome.results}  # type: ignore[union-attr]  # it was given one

    def _make(self, suite: Suite, at: int, declared: Expectation, faults: list[str]) -> Any:  # Any: as above
        known = sorted(self._registry.list_registered_expectation_implementations())
        place = f"{suite.name}.{declared.type}"
        if declared.type not in known:
            close = difflib.get_close_matches(declared.type, known, n=3) or known
            faults.append(f"{place}: no such expectation; close ones: {', '.join(close)}")
            return None
        try:
            return self._registry.get_expectation_impl(declared.type)(**declared.arguments, meta={"place": at})
        except (TypeError, ValueError) as error:
            said = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
            faults.append(f"{place}: {said}")
            return None


@contextmanager
def _quiet() -> Iterator[None]:
    # It imports deprecated modules and warns about its own internals; none of that is for our users.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_version(lake: Lake) -> Iterator[int]:
    """A transaction in which every read sees the same version."""
    lake.connection.execute("begin")
    try:
        yield lake.version()
    finally:
        lake.connection.execute("rollback")


def _run(lake: Lake, suite: Suite, engine: _Engine, expectations: Sequence[Any], version: int) -> SuiteResult:
    started_s = time.monotonic()
    try:
        relation = f"({suite.query})" if suite.query else quoted("lake", *suite.data.split(".", 1))
        present = [row[0] for row in lake.connection.execute(f"describe select * from {relation} as data").fetchall()]
        rows = _read(lake, suite, relation, present)
    except (duckdb.CatalogException, duckdb.BinderException, duckdb.ParserException) as error:
        reason = f"cannot read {suite.data!r}: {str(error).splitlines()[0]}; load it first, or mend the suite"
        results = tuple(_failed(declared, reason) for declared in suite.expectations)
        row_count = 0
    else:
        row_count = len(rows)
        results = _results(suite, engine, expectations, rows, present)
    return SuiteResult(
        name=suite.name,
        data=suite.data,
        is_success=all(result.is_success for result in results),
        is_blocking=suite.is_blocking,
        version=version,
        row_count=row_count,
        results=results,
        took_s=time.monotonic() - started_s,
    )


def _results(
    suite: Suite, engine: _Engine, expectations: Sequence[Any], rows: Any, present: Sequence[str]
) -> tuple[ExpectationResult, ...]:
    missing = {
        at: sorted(_columns(declared) - set(present))
        for at, declared in enumerate(suite.expectations)
        if not _columns(declared) <= set(present)
    }
    runnable = [made for at, made in enumerate(expectations) if at not in missing]
    outcomes = engine.validate(suite.name, rows, runnable) if runnable else {}
    return tuple(
        _failed(declared, f"{suite.data!r} has no column {', '.join(missing[at])}; it has {', '.join(present)}")
        if at in missing
        else _result(suite, declared, outcomes[at])
        for at, declared in enumerate(suite.expectations)
    )


def _read(lake: Lake, suite: Suite, relation: str, present: Sequence[str]) -> Any:  # Any: pandas has no types here
    """The columns that the suite needs, as a data frame."""
    wanted = [name for name in present if name in _needed(suite, present)]
    columns = ", ".join(quoted(name) for name in wanted) or "1 as one"
    table = lake.connection.execute(f"select {columns} from {relation} as data").to_arrow_table()
    # Whole numbers stay whole beside nulls; as floats, large keys would fall together.
    return table.to_pandas(integer_object_nulls=True, date_as_object=False)


def _needed(suite: Suite, present: Sequence[str]) -> set[str]:
    needed: set[str] = set()
    for declared in suite.expectations:
        columns = _columns(declared)
        is_about_the_table = not columns and declared.type not in _WITHOUT_COLUMNS
        if is_about_the_table or "row_condition" in declared.arguments:
            return set(present)
        needed |= columns
    return needed


def _columns(declared: Expectation) -> set[str]:
    named = (declared.arguments.get(argument) for argument in _COLUMN_ARGUMENTS)
    return {column for value in named for column in ([value] if isinstance(value, str) else value or []) if column}


def _result(suite: Suite, declared: Expectation, outcome: Any) -> ExpectationResult:  # Any: as above
    found: Mapping[str, Any] = outcome.result or {}
    observed = found.get("observed_value")
    unexpected = found.get("unexpected_count")
    return ExpectationResult(
        expectation=declared.type,
        column=declared.column,
        is_success=bool(outcome.success),
        observed=float(observed) if isinstance(observed, (int, float)) else None,
        unexpected_count=int(unexpected) if unexpected is not None else None,
        sentence=_sentence(suite, declared, outcome, found),
    )


def _sentence(suite: Suite, declared: Expectation, outcome: Any, found: Mapping[str, Any]) -> str:
    expected = ", ".join(f"{name} {value}" for name, value in declared.arguments.items() if name != "column")
    what = f"{declared.type}{f' ({expected})' if expected else ''}"
    of = f"{suite.data}.{declared.column}" if declared.column else suite.data
    if said := _exception(outcome):
        return f"{what} could not be tried on {of}: {said}"
    if outcome.success:
        return f"{of}: {what} holds"
    if found.get("unexpected_count") is not None:
        total = f" of {found['element_count']:,}" if "element_count" in found else ""
        return f"{of}: {found['unexpected_count']:,}{total} values break {what}"
    observed = found.get("observed_value")
    # Only figures are repeated: a list of values would be row data.
    seen = f"found {observed:,}" if isinstance(observed, (int, float)) else "it does not hold"
    return f"{of}: {what}, {seen}"


def _exception(outcome: Any) -> str:
    info = outcome.exception_info or {}
    parts = [info] if "raised_exception" in info else list(info.values())
    raised = [str(part.get("exception_message")) for part in parts if part.get("raised_exception")]
    return raised[0].splitlines()[0] if raised else ""


def _failed(declared: Expectation, sentence: str) -> ExpectationResult:
    return ExpectationResult(
        expectation=declared.type,
        column=declared.column,
        is_success=False,
        observed=None,
        unexpected_count=None,
        sentence=sentence,
    )
