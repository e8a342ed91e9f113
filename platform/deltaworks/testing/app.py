"""Run an app over rows and changes given as Python values, and compare its documents.

    assert_app(
        movies,
        given={"movie": [{"movie_id": 1, "title": "Alien", "status": "released"}]},
        changes=[update("movie", movie_id=1, status="draft")],
        then={},
    )

The app runs as in production: its log, its state, its steps, its clients. Only its sinks are replaced, by ones in
memory. After the given rows and after each change everything is processed, so a step sees every state in between.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pprint import pformat
from typing import Any

from deltaworks.config import Config
from deltaworks.process.app import App
from deltaworks.process.letters import Letter
from deltaworks.process.report import ProcessReport
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Document
from deltaworks.testing.memory_sink import MemorySink
from deltaworks.testing.source import ListSource, RowChange, dumped

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows by the short name of their table."""
Changes = Sequence[RowChange | Sequence[RowChange]]
"""Transactions one after the other: a change by itself, or several together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """An app after a run: what its sinks hold, what they were sent, and what failed."""

    sinks: Mapping[str, MemorySink]
    dead: Sequence[Letter]
    held: Sequence[Letter]
    report: ProcessReport

    @property
    def documents(self) -> Mapping[Any, Mapping[str, Any]]:
        """The documents of the app's first sink by key."""
        return self.sink().bodies

    @property
    def history(self) -> Sequence[Document]:
        """Every document that the first sink was sent, in order; the body is `None` where one was removed."""
        return self.sink().history

    def sink(self, name: str | None = None) -> MemorySink:
        """The stand-in for the sink of that name; for the first one when it is left out."""
        return self.sinks[name] if name is not None else next(iter(self.sinks.values()))


def run_app(
    app: App,
    *,
    given: Rows | None = None,
    changes: Changes = (),
    settings: Mapping[str, Any] | None = None,
    keys: Mapping[str, str | Sequence[str]] | None = None,
    patience_s: float = 2.0,
) -> Ran:
    """Run an app over rows that are there (as a dump finds them), then over changes.

    `settings` are handed to its clients, e.g. the `url` of a `FakeService`; `keys` says the own key of related
    tables that are updated or deleted. A held key is waited for up to `patience_s`.
    """
    source = ListSource(app, keys=keys)
    stand_ins = {spec.name: MemorySink(spec.name) for spec in app.sinks}
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                "home": Path(folder),
                "sources": {app.source: {"kind": "postgres", "dsn": "none", "tables": [str(app.entity.name)]}},
                "apps": {app.name: {"module": "none:none", "source": app.source, "settings": dict(settings or {})}},
            }
        )
        stood_in = app.with_sinks(list(stand_ins.values()))
        source.commit(*(dumped(table, **row) for table, rows in (given or {}).items() for row in rows))
        with Runner.open(stood_in, config=config, name=app.name, log=source.reader()) as runner:
            report = runner.drain(patience_s=patience_s)
            for change in changes:
                source.commit(*([change] if isinstance(change, RowChange) else change))
                report = runner.drain(patience_s=patience_s)
            return Ran(sinks=stand_ins, dead=runner.dead(), held=runner.held(), report=report)


def assert_app(
    app: App,
    *,
    given: Rows | None = None,
    changes: Changes = (),
    then: Mapping[Any, Mapping[str, Any]],
    sink: str | None = None,
    dead: Mapping[Any, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    keys: Mapping[str, str | Sequence[str]] | None = None,
    patience_s: float = 2.0,
) -> Ran:
    """Run the app (see `run_app`) and compare the documents of a sink, the first when none is named, with `then`.

    `dead` maps the keys that are to be dead letters to the name of the step that failed; no other may be one.

    Raises:
        AssertionError: they differ; the message lists each difference by key and field.
    """
    ran = run_app(app, given=given, changes=changes, settings=settings, keys=keys, patience_s=patience_s)
    faults = [*_differences(then, ran.sink(sink).bodies), *_failures(ran, dead or {})]
    if faults:
        listing = "\n".join(f"  {fault}" for fault in faults)
        raise AssertionError(f"app {app.name!r} did not do what was expected, {len(faults)} differences:\n{listing}")
    return ran


_ABSENT = object()


@dataclass(slots=True)
class _Differences:
    lines: list[str] = field(default_factory=list)

    def compare(self, wanted: Any, found: Any, place: str) -> None:
        if isinstance(wanted, Mapping) and isinstance(found, Mapping):
            for name in dict.fromkeys([*wanted, *found]):
                self.compare(wanted.get(name, _ABSENT), found.get(name, _ABSENT), f"{place}.{name}")
        elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
            for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
                self.compare(one, other, f"{place}[{index}]")
        elif wanted is _ABSENT:
            self.lines.append(f"{place}: not expected, found {_shown(found)}")
        elif found is _ABSENT:
            self.lines.append(f"{place}: missing, expected {_shown(wanted)}")
        elif wanted != found or type(wanted) is not type(found):
            self.lines.append(f"{place}: expected {_shown(wanted)}, found {_shown(found)}")


def _differences(wanted: Mapping[Any, Any], found: Mapping[Any, Any]) -> list[str]:
    differences = _Differences()
    for key in dict.fromkeys([*wanted, *found]):
        differences.compare(wanted.get(key, _ABSENT), found.get(key, _ABSENT), f"{key!r}")
    return differences.lines


def _failures(ran: Ran, expected: Mapping[Any, str]) -> list[str]:
    dead = {letter.key: letter for letter in ran.dead}
    lines = [
        f"{key!r}: expected to be a dead letter of step {step!r}, "
        + (f"is one of {dead[key].step!r}: {dead[key].error}" if key in dead else "is none")
        for key, step in expected.items()
        if key not in dead or dead[key].step != step
    ]
    lines += [f"{key!r}: {letter.step} failed: {letter.error}" for key, letter in dead.items() if key not in expected]
    return lines + [
        f"{letter.key!r}: waits for {letter.step} after {letter.attempts} tries: {letter.error}" for letter in ran.held
    ]


def _shown(value: Any) -> str:
    text = pformat(value, width=100, compact=True, sort_dicts=False)
    return text if "\n" not in text else text.replace("\n", "\n      ")
