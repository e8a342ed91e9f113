"""An app as text: what it reads, its steps in order, where it leaves, and what it has to remember."""

from collections.abc import Iterator
from pathlib import Path

from deltaworks.process.app import App
from deltaworks.process.declared import DedupStep, EnrichStep, ProjectStep, Step, WindowStep
from deltaworks.process.direct.reducer import is_direct, is_vectorised


def explain(app: App) -> str:
    """The drawing, a step a line with its options and its place."""
    lines = [app.name, f"  {app.entity}, one document per {app.key}"]
    lines += [f"  ├─ {table}, by {table.key or app.key}" for table in app.related]
    lines += [f"  │  {step.kind} {step.name}{_options(step)}  {_short(step.place)}" for step in app.steps]
    lines += [f"  ├─ on change of {step.column}: {step.name}  {_short(step.place)}" for step in app.reactions]
    lines += [f"  ╰─► {type(sink).__name__} {sink.name}" for sink in app.sinks]
    lines.append(f"  {_plan(app)}")
    return "\n".join(lines)


def _plan(app: App) -> str:
    if not is_direct(app):
        return "remembers every row it reads, because a document needs more than the row that changed"
    if is_vectorised(app):
        return "remembers no rows; changes stay in columns from the log to the sinks"
    return "remembers no rows; each change becomes one object"


def _options(step: Step) -> str:
    said = list(_said(step))
    return f" ({', '.join(said)})" if said else ""


def _said(step: Step) -> Iterator[str]:
    match step:
        case EnrichStep():
            yield f"{step.batch} ids a call, {step.concurrency} at once, {step.timeout_s:g} s each"
            if step.rate_per_s is not None:
                yield f"at most {step.rate_per_s:g} calls/s"
            if step.lookup is not None:
                yield f"again when {step.lookup} changes"
        case ProjectStep():
            yield ", ".join(name if name == field else f"{field} as {name}" for name, field in step.fields.items())
        case DedupStep():
            yield f"by {', '.join(step.fields)}" if step.fields else "by the whole document"
        case WindowStep():
            yield f"of {step.size}"
            if step.every != step.size:
                yield f"every {step.every}"
            if step.by:
                yield f"by {', '.join(step.by)}"
            if step.lateness is not None:
                yield f"closed {step.lateness} later"
            yield ", ".join(step.aggregates)


def _short(place: str) -> str:
    file, _, line = place.rpartition(":")
    path = Path(file)
    here = Path.cwd()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path.name}:{line}"
