"""Writing apps: begin one from a captured table, check it, draw it, and run it while it is edited."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType

from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, TerminalError
from deltaworks.log.registry import open_reader
from deltaworks.log.tables import latest_schemas
from deltaworks.operate.lease import leased
from deltaworks.process import explain
from deltaworks.process.app import App
from deltaworks.process.check import AppError
from deltaworks.process.place import AppHeldError
from deltaworks.process.registry import load_app
from deltaworks.process.runner import Runner
from deltaworks.process.shape import reads
from deltaworks.process.tuning import TUNING_FILE, save_tuning
from deltaworks.schema import TableName, TableSchema

_LOOK_EVERY_S = 0.3
_TYPES = {"int": int, "bool": bool, "Decimal": Decimal, "float": float, "datetime": datetime, "date": date, "str": str}

_TEMPLATE = '''"""The app `{name}`: rows of `{table}` in a search index."""

{imports}

from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.search import SearchIndex


class {record}(TypedDict):
    """What is read of `{table}`; take away what you do not need."""

{fields}


{source} = Source("{source}")
{name} = App("{name}", key="{key}", sources=[{source}.table("{table}", schema={record})])


@{name}.filter
def is_wanted({row}: Entity[{record}]) -> bool:
    """Keep what this is true of."""
    return True


@{name}.transform
def document({row}: Entity[{record}]) -> {record}:
    """The document of one row."""
    return {row}.after


{name}.sink(SearchIndex("{name}", text={{{text}}}))
'''


class AppFileError(TerminalError):
    """An app file cannot be begun."""


def check_app(config: Config, name: str) -> App:
    """Load an app and compare it with the tables that are captured.

    Raises:
        AppError: it does not load.
        SchemaMismatchError: all that does not fit.
    """
    app = load_app(config, name)
    reader = open_reader(config, app.source)
    app.check(latest_schemas(reader, wanted=[table.name for table in app.tables]).values(), is_complete=False)
    return app


def explain_app(config: Config, name: str) -> str:
    """The steps of an app as text."""
    return explain.explain(load_app(config, name))


def tune_app(config: Config, name: str, changes: Mapping[str, str]) -> Mapping[str, float]:
    """Set limits of an app's steps, also while it runs; gives all that are set.

    Raises:
        TuningError: no such limit, or a value it cannot have.
    """
    return save_tuning(config.app_folder(name) / TUNING_FILE, load_app(config, name), changes)


def begin_app(config: Config, name: str, *, source: str, table: str, file: Path) -> str:
    """Write a small working app over a captured table; gives what to add to deltaworks.yaml.

    Raises:
        AppFileError: the file is there, the name is none for Python, or the table has not been captured.
    """
    if file.exists():
        raise AppFileError(f"cannot write {str(file)!r}: it is there already; choose another --file")
    if not name.isidentifier():
        raise AppFileError(f"cannot call an app {name!r}; use letters, digits and _")
    wanted = TableName.parse(table)
    schema = latest_schemas(open_reader(config, source), wanted=[wanted]).get(wanted)
    if schema is None:
        raise AppFileError(f"table {table!r} of source {source!r} is not in the log; run `deltaworks capture {source}`")
    if len(schema.key) != 1:
        raise AppFileError(f"table {table!r} has the key {', '.join(schema.key)}; an app's entities have a key of one")
    file.write_text(_text(schema, name=name, source=source, table=table), encoding="utf-8")
    return f"apps:\n  {name}:\n    module: {file.stem}:{name}\n    source: {source}"


def follow_reloading(config: Config, name: str, *, stop: threading.Event, say: Callable[[str], None] = print) -> None:
    """Run an app until `stop`, anew whenever its file changes; a broken edit keeps the one that runs and is told of."""
    app = load_app(config, name)
    edits = _Edits(config, name, say=say)
    while not stop.is_set():
        with leased(lambda app=app: Runner.open(app, config=config, name=name), AppHeldError, stop=stop) as runner:  # type: ignore[misc]
            if runner is not None:
                app = edits.follow(runner, app, stop=stop)


class _Edits:
    """The app's file as it is edited."""

    def __init__(self, config: Config, name: str, *, say: Callable[[str], None]) -> None:
        self._config = config
        self._name = name
        self._module = config.app(name).module.partition(":")[0]
        file = sys.modules[self._module].__file__
        if file is None:
            raise AppError(f"app {name!r}: module {self._module!r} has no file to watch; run it without --reload")
        self._file = Path(file)
        self._seen = self._changed_at()
        self._say = say

    def follow(self, runner: Runner, app: App, *, stop: threading.Event) -> App:
        """Run until `stop` or a good edit; the app to go on with."""
        until = threading.Event()
        found = [app]

        def watch() -> None:
            while not until.wait(_LOOK_EVERY_S):
                if stop.is_set():
                    until.set()
                elif (edited := self._edited()) is not None:
                    found[0] = edited
                    until.set()

        watcher = threading.Thread(target=watch, name=f"edits-of-{self._name}", daemon=True)
        watcher.start()
        try:
            runner.follow(until)
        finally:
            until.set()
            watcher.join()
        return found[0]

    def _edited(self) -> App | None:
        changed_at = self._changed_at()
        if changed_at == self._seen:
            return None
        self._seen = changed_at
        before = sys.modules[self._module]
        try:
            # A module of its own, so that a broken edit leaves the functions that run with what they know.
            sys.modules[self._module] = self._imported()
            app = check_app(self._config, self._name)
        except Exception as error:  # An edit may raise anything at import; the old app goes on.
            sys.modules[self._module] = before
            told = (
                str(error) if isinstance(error, DeltaworksError | SyntaxError) else f"{type(error).__name__}: {error}"
            )
            self._say(f"{self._name}: kept as it was; {told}")
            return None
        self._say(f"{self._name}: loaded anew")
        return app

    def _imported(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(self._module, self._file)
        if spec is None or spec.loader is None:
            raise AppError(f"cannot import {str(self._file)!r} again")
        module = importlib.util.module_from_spec(spec)
        # Compiled from the text, because two edits within a second may leave a stale .pyc of the same size.
        exec(compile(self._file.read_text(encoding="utf-8"), str(self._file), "exec"), module.__dict__)  # noqa: S102
        return module

    def _changed_at(self) -> int:
        try:
            return self._file.stat().st_mtime_ns
        except FileNotFoundError:
            # An editor may put a new file in its place at this moment.
            return 0


def _text(schema: TableSchema, *, name: str, source: str, table: str) -> str:
    fields = {}
    for column in schema.columns:
        kind = next((word for word, declared in _TYPES.items() if reads(declared, column.type)), None)
        if kind is not None:
            fields[column.name] = kind + (" | None" if column.nullable and column.name not in schema.key else "")
    words = {kind.partition(" ")[0] for kind in fields.values()}
    dated = sorted(words & {"date", "datetime"})
    imports = [f"from datetime import {', '.join(dated)}"] if dated else []
    imports += ["from decimal import Decimal"] if "Decimal" in words else []
    text = [column for column, kind in fields.items() if kind.startswith("str")] or list(fields)[:1]
    return _TEMPLATE.format(
        name=name,
        source=source,
        table=table,
        key=schema.key[0],
        record=schema.name.name.title().replace("_", ""),
        row=schema.name.name,
        imports="\n".join([*imports, "from typing import TypedDict"]),
        fields="\n".join(f"    {column}: {kind}" for column, kind in fields.items()),
        text=", ".join(f'"{column}": 1.0' for column in text),
    )
