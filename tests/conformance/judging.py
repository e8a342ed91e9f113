"""Compares what came out with what a case file expects; every difference is a sentence."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outcome import Event, Sink, in_commit_order
from place import Database
from values import Row, is_same

from deltaworks.schema import TableName


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All that an expectation may be about."""

    database: Database
    sink: Sink
    events: Sequence[Event]
    """Since the case's changes began, or since its dump was asked for."""
    reports: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    chunk_rows: int = 0

    @property
    def streamed(self) -> list[Event]:
        return in_commit_order([event for event in self.events if event.txid or event.op == "m"])

    def of_op(self, op: str) -> list[Event]:
        return [event for event in self.events if event.op == op]


def shown(table: TableName) -> str:
    """A table's name as case files write it."""
    return table.name if table.namespace == "public" else f"{table.namespace}.{table.name}"


def judge(expected: Mapping[str, Any], outcome: Outcome) -> list[str]:
    """Every way in which the outcome differs; empty when the case has passed."""
    differences: list[str] = []
    for name, wanted in expected.items():
        check = _CHECKS.get(name)
        if check is None:
            differences.append(f"cannot judge {name!r}: the runner does not know it")
        else:
            differences += check(wanted, outcome)
    return differences


def final_differences(wanted: Mapping[str, Sequence[Mapping[str, Any]]], outcome: Outcome) -> Iterator[str]:
    """Compare tables of the sink with the rows of a case file, in any order."""
    roots = outcome.database.root_of()
    for name, rows in wanted.items():
        actual = [row for table in _tables_named(name, outcome, roots) for row in outcome.sink.rows(table)]
        computed = {
            column for table in _tables_named(name, outcome, roots) for column in _computed(outcome.database, table)
        }
        left = list(actual)
        for row in rows:
            found = next((each for each in left if _is_row(row, each, computed)), None)
            if found is None:
                yield f"final {name}: no row {_brief(row)} among {[_brief(each) for each in actual]}"
            else:
                left.remove(found)
        yield from (f"final {name}: one row too many, {_brief(row)}" for row in left)


def source_differences(outcome: Outcome) -> Iterator[str]:
    """Compare every captured table of the sink with the source as it is now."""
    for table in sorted({*outcome.sink.tables, *outcome.sink.bags, *outcome.database.user_tables(roots=True)}):
        if table in outcome.facts.get("uncaptured", ()):
            continue
        actual, source = outcome.sink.rows(table), outcome.database.texts(table)
        if actual and source:
            # Only the sink has a column that was dropped, and only the source may have one that it computes.
            columns = source[0].keys() - (_computed(outcome.database, table) - actual[-1].keys())
            actual, source = _only(columns, actual), _only(columns, source)
        missing = Counter(map(_frozen, source)) - Counter(map(_frozen, actual))
        extra = Counter(map(_frozen, actual)) - Counter(map(_frozen, source))
        if missing or extra:
            yield (
                f"{table}: {missing.total()} rows of the source are not in the sink, {extra.total()} of the sink not "
                f"in the source; e.g. {_brief(dict(next(iter(missing or extra))))}"
            )


def _only(columns: Collection[str], rows: Sequence[Row]) -> list[Row]:
    return [{name: text for name, text in row.items() if name in columns} for row in rows]


def _events(wanted: Sequence[Mapping[str, Any]], outcome: Outcome) -> Iterator[str]:
    actual = outcome.streamed
    transactions: dict[int, int] = {}
    for place, expected in enumerate(wanted):
        if not actual:
            yield f"event {place + 1} of {len(wanted)} is missing: {_brief(expected)}"
            return
        if expected["op"] == "t":
            yield from _truncate(expected, actual)
            continue
        event = actual.pop(0)
        differences = list(_event(expected, event))
        if expected.get("tx") is not None and transactions.setdefault(expected["tx"], event.commit) != event.commit:
            differences.append("is of another transaction")
        yield from (f"event {place + 1} ({event.op} {shown(event.table)}) {each}" for each in differences)
    # Nothing flushes a message outside of a transaction, so whether the last ones have come is chance.
    while actual and actual[-1].op == "m" and actual[-1].row["transactional"] == "f":
        actual.pop()
    yield from (f"one event too many: {event.op} {shown(event.table)} {event.key}" for event in actual)
    if sorted(transactions.values()) != [transactions[each] for each in sorted(transactions)]:
        yield "transactions are out of order"


def _event(expected: Mapping[str, Any], event: Event) -> Iterator[str]:
    if expected["op"] != event.op:
        yield f"should have op {expected['op']}"
        return
    if event.op == "m":
        for name in ("prefix", "content", "transactional"):
            if name in expected and not is_same(expected[name], event.row.get(name)):
                yield f"has {name} {event.row.get(name)!r}, expected {expected[name]!r}"
        return
    if expected["table"] != shown(event.table):
        yield f"should be of {expected['table']}"
    yield from _parts("key", expected.get("key"), event.key, event)
    if "old_key" in expected and expected["old_key"] != expected.get("key"):
        yield from _parts("old key", expected["old_key"], event.old_key, event)
    elif "old_key" not in expected and event.old_key is not None:
        yield f"has an old key {event.old_key}"
    if event.op == "d":
        yield from _parts("before", expected.get("before"), (event.before or {}) | event.key, event, may_have_more=True)
        return
    yield from _parts("before", expected.get("before"), event.before, event)
    yield from _after(expected, event)


def _after(expected: Mapping[str, Any], event: Event) -> Iterator[str]:
    after, before = expected.get("after", {}), expected.get("before", {})
    filled, unsent = expected.get("filled_from_before", ()), expected.get("unchanged", ())
    known = {**before, **expected.get("old_key", {}), **expected.get("key", {})}
    for name in {*after, *filled, *unsent} - event.row.keys():
        yield f"lacks column {name!r}"
    for name in event.row.keys() - {*after, *filled, *unsent}:
        yield f"has a column {name!r} too many"
    for name, text in event.row.items():
        if name in after and (name in event.unchanged or not _same(after[name], text, event, name)):
            yield f"has {name} = {text!r}, expected {after[name]!r}"
        if name in filled and not _same(before[name], text, event, name):
            yield f"has {name} = {text!r}, not the value of the before image"
        if (
            name in unsent
            and name not in event.unchanged
            and not (name in known and _same(known[name], text, event, name))
        ):
            yield f"has {name} = {text!r} although the source did not send it"


def _truncate(expected: Mapping[str, Any], actual: list[Event]) -> Iterator[str]:
    left = set(expected["tables"])
    while left:
        if not actual or actual[0].op != "t" or shown(actual[0].table) not in left:
            yield f"truncate of {sorted(left)} is missing"
            return
        left.discard(shown(actual.pop(0).table))


def _parts(
    what: str, wanted: Mapping[str, Any] | None, actual: Row | None, event: Event, *, may_have_more: bool = False
) -> Iterator[str]:
    if wanted is None:
        return
    if actual is None:
        yield f"has no {what}, expected {_brief(wanted)}"
    elif not may_have_more and wanted.keys() != actual.keys():
        yield f"has {what} with columns {sorted(actual)}, expected {sorted(wanted)}"
    elif any(not _same(value, actual.get(name), event, name) for name, value in wanted.items()):
        yield f"has {what} {_brief(actual)}, expected {_brief(wanted)}"


def _rows(wanted: Mapping[str, Sequence[Mapping[str, Any]]], outcome: Outcome) -> Iterator[str]:
    yield from final_differences(wanted, outcome)
    columns = {(event.table, column.name): column for event in outcome.events for column in event.schema.columns}
    for (table, name), column in columns.items():
        if not column.source_type:
            yield f"{table}.{name} does not say its type"


def _either(wanted: Sequence[Mapping[str, Any]], outcome: Outcome) -> Iterator[str]:
    tried = [judge(each, outcome) for each in wanted]
    if all(tried):
        yield f"none of {len(wanted)} alternatives holds: {tried}"


def _report(wanted: str | Mapping[str, Any], outcome: Outcome) -> Iterator[str]:
    for name, value in {wanted: True}.items() if isinstance(wanted, str) else wanted.items():
        if outcome.reports.get(name) != value:
            yield f"report {name!r} is {outcome.reports.get(name)!r}, expected {value!r}"


def _invariants(wanted: Sequence[str], outcome: Outcome) -> Iterator[str]:
    for name in wanted:
        if name not in _INVARIANTS:
            yield f"cannot judge the invariant {name!r}: the runner does not know it"
        else:
            yield from (f"{name}: {each}" for each in _INVARIANTS[name](outcome))


def _count_op(wanted: Mapping[str, int], outcome: Outcome) -> Iterator[str]:
    for op, count in wanted.items():
        if len(outcome.of_op(op)) != count:
            yield f"{len(outcome.of_op(op))} events of op {op}, expected {count}"


def _keys_in_order(wanted: str, outcome: Outcome) -> Iterator[str]:
    keys = [int(next(iter(event.key.values())) or 0) for event in outcome.streamed]
    if keys != _range(wanted):
        yield f"keys are not {wanted} in order"


def _keys_seen(wanted: str, outcome: Outcome) -> Iterator[str]:
    seen = {int(next(iter(event.key.values())) or 0) for event in outcome.events}
    if missing := sorted(set(_range(wanted)) - seen):
        yield f"keys {missing} were not seen"


def _transactions(wanted: int, outcome: Outcome) -> Iterator[str]:
    found = len({event.commit for event in outcome.streamed})
    if found != wanted:
        yield f"{found} transactions, expected {wanted}"


def _final_rows(wanted: Mapping[str, int], outcome: Outcome) -> Iterator[str]:
    roots = outcome.database.root_of()
    for name, count in wanted.items():
        found = sum(len(outcome.sink.rows(table)) for table in _tables_named(name, outcome, roots))
        if found != count:
            yield f"final {name} has {found} rows, expected {count}"


def _each_key_once(wanted: bool, outcome: Outcome) -> Iterator[str]:
    twice = [key for key, count in Counter((e.table, _frozen(e.key)) for e in outcome.of_op("r")).items() if count > 1]
    if wanted and twice:
        yield f"{len(twice)} keys were read more than once"


def _ops_for_key(wanted: Mapping[str, Sequence[str]], outcome: Outcome) -> Iterator[str]:
    for place, ops in wanted.items():
        found = [event.op for event in outcome.events if place in (_place(event), _place(event, old=True))]
        if found != list(ops):
            yield f"{place} had ops {found}, expected {list(ops)}"


def _present(wanted: Sequence[str], outcome: Outcome) -> Iterator[str]:
    yield from (f"{place} is not in the sink" for place in wanted if _found(place, outcome) is None)


def _absent(wanted: Sequence[str], outcome: Outcome) -> Iterator[str]:
    yield from (f"{place} is in the sink" for place in wanted if _found(place, outcome) is not None)


def _last_value(wanted: Mapping[str, Mapping[str, Any]], outcome: Outcome) -> Iterator[str]:
    for place, values in wanted.items():
        row = _found(place, outcome) or {}
        if any(not is_same(value, row.get(name)) for name, value in values.items()):
            yield f"{place} is {_brief(row)}, expected {_brief(values)}"


def _read_keys(wanted: Sequence[str], outcome: Outcome) -> Iterator[str]:
    found = sorted({_place(event) for event in outcome.of_op("r")})
    if found != sorted(wanted):
        yield f"read keys {found}, expected {sorted(wanted)}"


def _dups_max_rows(wanted: int, outcome: Outcome) -> Iterator[str]:
    seen = Counter((event.table, event.op, _frozen(event.key)) for event in outcome.of_op("r"))
    seen.update((event.table, event.op, (event.commit, event.ordinal)) for event in outcome.streamed)
    repeated = sum(count - 1 for count in seen.values())
    if repeated > wanted:
        yield f"{repeated} rows came twice, at most {wanted} may"


def _fact_at_most(name: str) -> Callable[[float, Outcome], Iterator[str]]:
    def check(wanted: float, outcome: Outcome) -> Iterator[str]:
        found = outcome.facts.get(name)
        if found is None or found > wanted:
            yield f"{name} is {found}, at most {wanted} expected"

    return check


def _fact_is(name: str) -> Callable[[Any, Outcome], Iterator[str]]:
    def check(wanted: Any, outcome: Outcome) -> Iterator[str]:
        if outcome.facts.get(name) != wanted:
            yield f"{name} is {outcome.facts.get(name)!r}, expected {wanted!r}"

    return check


def _final_equals_source(wanted: bool, outcome: Outcome) -> Iterator[str]:
    if wanted != (not list(source_differences(outcome))):
        yield f"sink = source is not {wanted}: {list(source_differences(outcome))}"


def _order(outcome: Outcome) -> Iterator[str]:
    last: dict[tuple[TableName, Any], tuple[int, int]] = {}
    for event in outcome.events:
        place = (event.table, _frozen(event.key) if event.schema.key else None)
        if event.identity < last.get(place, (0, 0)):
            yield f"{_place(event)} went back to {event.identity}"
        last[place] = max(event.identity, last.get(place, (0, 0)))


def _single_active(outcome: Outcome) -> Iterator[str]:
    epochs = outcome.facts.get("epochs", [])
    if epochs != sorted(epochs):
        yield f"an older writer wrote after a newer one: epochs {epochs}"


def _no_strangers(outcome: Outcome) -> Iterator[str]:
    known = {*outcome.database.user_tables(roots=True), *outcome.database.user_tables(roots=False)}
    strangers = {event.table for event in outcome.events if event.op != "m"} - known
    yield from (f"{table} is none of the user's tables" for table in strangers)


def _one_shape(outcome: Outcome) -> Iterator[str]:
    shapes: dict[tuple[TableName, int], set[tuple[str, ...]]] = {}
    for event in outcome.of_op("r"):
        shapes.setdefault((event.table, event.commit), set()).add(event.schema.names)
    yield from (
        f"a chunk of {table} has {len(names)} shapes" for (table, _c), names in shapes.items() if len(names) > 1
    )


_CHECKS: Mapping[str, Callable[[Any, Outcome], Iterator[str]]] = {
    "events": _events,
    "final": final_differences,
    "rows": _rows,
    "invariants": _invariants,
    "either": _either,
    "report": _report,
    "count_op": _count_op,
    "keys_in_order": _keys_in_order,
    "keys_seen": _keys_seen,
    "transactions": _transactions,
    "final_rows": _final_rows,
    "each_key_once": _each_key_once,
    "ops_for_key": _ops_for_key,
    "present_keys": _present,
    "absent_keys": _absent,
    "last_value": _last_value,
    "read_keys": _read_keys,
    "dups_max_rows": _dups_max_rows,
    "chunks_read_after_restart_max": _fact_at_most("chunks_read_after_restart"),
    "slot_lag_max_mb": _fact_at_most("slot_lag_mb"),
    "max_log_lag_seconds": _fact_at_most("log_lag_s"),
    "dump_ends": _fact_is("dump_ends"),
    "connector": _fact_is("connector"),
    "final_equals_source": _final_equals_source,
    "note": lambda _wanted, _outcome: iter(()),
}

_INVARIANTS: Mapping[str, Callable[[Outcome], Iterator[str]]] = {
    "final_equals_source": source_differences,
    "no_loss": source_differences,
    "per_key_order": _order,
    "no_stale_after_newer": lambda outcome: iter(outcome.sink.stale),
    "dump_value_equals_log_value": lambda outcome: iter(outcome.facts.get("mode_differences", ())),
    "single_active": _single_active,
    "marks_not_in_output": _no_strangers,
    "no_mixed_schema_chunk": _one_shape,
}


def _tables_named(name: str, outcome: Outcome, roots: Mapping[TableName, TableName]) -> list[TableName]:
    known = {*outcome.sink.tables, *outcome.sink.bags}
    return [table for table in known if name in (shown(table), shown(roots.get(table, table)))]


def _computed(database: Database, table: TableName) -> set[str]:
    return database.generated_columns(table) if table in database.user_tables(roots=False) else set()


def _is_row(wanted: Mapping[str, Any], row: Row, computed: set[str]) -> bool:
    # What the source computes may be left out, as long as it is so on both paths.
    names = [name for name in wanted if name in row or name not in computed]
    return row.keys() <= wanted.keys() and all(name in row and is_same(wanted[name], row[name]) for name in names)


def _same(wanted: Any, actual: str | None, event: Event, name: str) -> bool:
    kind = event.schema.column(name).source_type if name in event.schema.names else ""
    return is_same(wanted, actual, kind)


def _place(event: Event, *, old: bool = False) -> str:
    key = event.old_key or {} if old else event.key
    return f"{shown(event.table)}/" + ",".join(text or "" for text in key.values())


def _found(place: str, outcome: Outcome) -> Row | None:
    name, _, key = place.partition("/")
    roots = outcome.database.root_of()
    for table in _tables_named(name, outcome, roots):
        if (row := outcome.sink.find(table, key.split(","))) is not None:
            return row
    return None


def _range(text: str) -> list[int]:
    first, _, last = text.partition("..")
    return list(range(int(first), int(last) + 1))


def _frozen(row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(row.items()))


def _brief(row: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {str(value)[:40]}" for name, value in row.items()) + "}"
