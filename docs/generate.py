"""Write the reference pages from the code; `--check` fails when one is stale.

| page                | from                              |
|---------------------|-----------------------------------|
| reference/cli.md    | the help of every command         |
| reference/config.md | the model of `deltaworks.yaml`    |
| reference/errors.md | every error class and its meaning |
| reference/metrics.md | every Prometheus metric of capture and of apps |
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer.main
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import deltaworks
from deltaworks.cli import app
from deltaworks.config import (
    AppConfig,
    ArchiveConfig,
    Config,
    KafkaLogConfig,
    LakeConfig,
    LocalLogConfig,
    PostgresConfig,
    S3Config,
    ServeConfig,
)
from deltaworks.connection import CONNECTIONS
from deltaworks.errors import DeltaworksError
from deltaworks.log.metrics import CAPTURE_METRICS, TABLE_METRICS
from deltaworks.operate.audit_metrics import audit_metrics
from deltaworks.operate.freshness import age_metrics
from deltaworks.process.metrics import APP_METRICS
from deltaworks.process.standing import StandingCollector

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; change the code and run `make docs`. -->\n\n"


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = ["# The command line\n\n`deltaworks COMMAND --help` says the same.\n"]
    for words, command in _commands(typer.main.get_command(app), "deltaworks"):
        parts.append(f"\n## `{words}`\n\n{inspect.cleandoc(command.help or '')}\n")
        arguments = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
        parts.append(f"\n    {words} {arguments}".rstrip() + "\n")
        options = [p for p in command.params if p.param_type_name == "option"]
        if options:
            parts.append("\n| option | meaning | default |\n|---|---|---|\n")
            parts += [f"| `{', '.join(p.opts)}` | {p.help or ''} | `{p.default}` |\n" for p in options]
    return "".join(parts)


def _commands(group: Any, words: str) -> Iterator[tuple[str, Any]]:  # Any: what Typer builds declares no types
    """Every command by its words, those of groups as well."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{words} {name}")
        else:
            yield f"{words} {name}", command


def config_page() -> str:
    """Every section and setting of `deltaworks.yaml`."""
    sections: list[tuple[str, type[BaseModel]]] = [
        ("the file", Config),
        ("sources.NAME", PostgresConfig),
        ("sources.NAME.log, kind: local", LocalLogConfig),
        ("sources.NAME.log.archive, kind: local", ArchiveConfig),
        ("sources.NAME.log, kind: kafka", KafkaLogConfig),
        ("apps.NAME", AppConfig),
        *(
            (f"connections.NAME, kind: {get_args(each.model_fields['kind'].annotation)[0]}", each)
            for each in CONNECTIONS
        ),
        ("lake", LakeConfig),
        ("lake.s3", S3Config),
        ("serve", ServeConfig),
    ]
    parts = ["# `deltaworks.yaml`\n\n`${NAME}` and `${NAME:-default}` read the environment.\n"]
    for title, model in sections:
        parts.append(f"\n## {title}\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n")
        parts.append("| setting | type | default | meaning |\n|---|---|---|---|\n")
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{_default(field)}`"
            kind = _kind(inspect.formatannotation(field.annotation))
            parts.append(f"| `{name}` | {kind} | {default} | {' '.join((field.description or '').split())} |\n")
    return "".join(parts)


def errors_page() -> str:
    """Every error, grouped by what the caller can do."""
    for module in pkgutil.walk_packages(deltaworks.__path__, "deltaworks."):
        importlib.import_module(module.name)
    parts = ["# Errors\n\nWhat a caller can do decides the class; the message says the value and the next step.\n"]
    for kind in sorted(DeltaworksError.__subclasses__(), key=lambda each: each.__name__):
        parts.append(f"\n## {kind.__name__}\n\n{_first_line(kind)}\n\n| error | means | raised in |\n|---|---|---|\n")
        for error in sorted(set(_below(kind)), key=lambda each: each.__name__):
            parts.append(f"| `{error.__name__}` | {_first_line(error)} | `{error.__module__}` |\n")
    return "".join(parts)


def metrics_page() -> str:
    """Every metric that `--metrics` of `deltaworks capture` and of `deltaworks process` gives."""
    parts = [
        "# Metrics\n\n`deltaworks capture SOURCE --metrics PORT` gives these on `http://127.0.0.1:PORT/metrics`. "
        "A metric without a known value, for example while the source does not answer, has no sample.\n"
    ]
    for title, metrics in (("Labelled `source` and `table`", TABLE_METRICS), ("Labelled `source`", CAPTURE_METRICS)):
        parts.append(f"\n## {title}\n\n| metric | kind | meaning |\n|---|---|---|\n")
        for metric in metrics:
            kind = "counter" if getattr(metric, "is_counter", False) else "gauge"
            parts.append(f"| `{metric.name}` | {kind} | {metric.help} |\n")
    for family in audit_metrics():
        parts.append(f"| `{family.name}` | gauge | {family.documentation} |\n")
    parts.append(
        "\n## Of apps\n\n`deltaworks process APP --metrics PORT` gives these.\n\n"
        "| metric | kind | labels | meaning |\n|---|---|---|---|\n"
    )
    for metric in (*APP_METRICS, *StandingCollector("app", Path("nowhere")).collect(), *age_metrics()):
        for family in metric.collect() if isinstance(metric, MetricWrapperBase) else [metric]:
            labels = metric._labelnames
            name = family.name + ("_total" if family.type == "counter" else "")
            parts.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |\n")
    return "".join(parts)


PAGES = {"cli.md": cli_page, "config.md": config_page, "errors.md": errors_page, "metrics.md": metrics_page}


def main() -> int:
    """Write all pages, or with `--check` name those that would change."""
    stale = []
    FOLDER.mkdir(exist_ok=True)
    for name, build in PAGES.items():
        path, text = FOLDER / name, NOTE + build()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(FOLDER.parent.parent)))
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return len(stale)


def _below(kind: type[DeltaworksError]) -> Iterator[type[DeltaworksError]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("deltaworks."):
            yield child
        yield from _below(child)


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _kind(annotation: str) -> str:
    """A type in a word, for people who write YAML."""
    words = {"Literal": "one of ", "Mapping": "mapping", "tuple": "list", "Secret": "text, secret", "Path": "path"}
    for part, word in words.items():
        if part in annotation:
            return word + annotation.partition("[")[2].rstrip("]") if part == "Literal" else word
    return {"str": "text", "int": "number"}.get(annotation.partition(" ")[0], "section")


def _default(field: object) -> object:
    value = field.get_default(call_default_factory=True)  # type: ignore[attr-defined]
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return "see its section"
    return value


if __name__ == "__main__":
    sys.exit(main())
