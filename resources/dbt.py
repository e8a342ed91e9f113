"""dbt in the process of the run, its results as the events that dagster-dbt makes of them.

A run that already has dbt imported builds at once; the command line would import it anew, which
takes longer than many builds. Selection and events are dagster-dbt's own.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster_dbt import DbtProject
from dagster_dbt.asset_utils import get_updated_cli_invocation_params_for_context
from dagster_dbt.core.dbt_cli_event import DbtCoreCliEventMessage
from dagster_dbt.dagster_dbt_translator import DagsterDbtTranslator

from deltaworks.config import Config
from resources import environment

PROJECT = DbtProject(project_dir=environment.ROOT / "dbt_project")
_INPUTS = ("dbt_project.yml", "profiles.yml", "models/**/*", "macros/**/*", "tests/**/*")
_RESULTS = frozenset({"LogModelResult", "LogSeedResult", "LogSnapshotResult", "LogTestResult"})
"""What dbt calls the messages that dagster-dbt makes events of; there are 20 times as many others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What one `dbt build` did: events in dbt's order, and the SQL of each model that was compiled, by dbt's id."""

    events: list[Any]  # Any: the union of dagster-dbt's events
    statements: Mapping[str, str]
    failure: str | None

    def raise_on_failure(self) -> None:
        """Fail the step if a model or a test failed; what the others built stays."""
        if self.failure is not None:
            raise dg.Failure(self.failure)


class Dbt(dg.ConfigurableResource):  # type: ignore[type-arg]  # the value is the resource itself
    """The dbt of this environment. One build at a time in a process: dbt keeps its flags in globals."""

    project_dir: str
    target_dir: str

    def build(self, context: dg.AssetExecutionContext) -> Build:
        """Build what the run selected, models and tests. Failures of models and tests are in the answer."""
        selected = get_updated_cli_invocation_params_for_context(
            context=context, manifest={}, dagster_dbt_translator=DagsterDbtTranslator()
        )
        project_dir = str(selected.dbt_project.project_dir if selected.dbt_project else self.project_dir)
        arguments = [*selected.selection_args]
        if selected.indirect_selection:
            arguments += ["--indirect-selection", selected.indirect_selection]
        messages: list[dict[str, Any]] = []  # Any: dbt's messages as JSON
        with _quiet():
            result = _invoke(project_dir, self.target_dir, arguments, messages)
        if result.exception is not None:
            raise result.exception
        events = [
            event
            for message in messages
            for event in DbtCoreCliEventMessage(raw_event=message, event_history_metadata={}).to_default_asset_events(
                manifest=selected.manifest,
                dagster_dbt_translator=selected.dagster_dbt_translator,
                context=context,
                project=selected.dbt_project,
            )
        ]
        return Build(
            events=events,
            statements={
                each.node.unique_id: each.node.compiled_code
                for each in result.result.results
                if each.node.resource_type == "model" and each.node.compiled_code
            },
            failure=None if result.success else _failure(result.result.results),
        )


def prepared_project() -> DbtProject:
    """The project with a manifest of what it is now; parsing it takes some seconds, so only when it changed."""
    environment.find_programs_beside_python()
    if _is_stale():
        PROJECT.preparer.prepare(PROJECT)
    return PROJECT


def dbt(config: Config) -> Dbt:
    """The dbt of this project, pointed at the lake of this configuration."""
    environment.export_lake(config)
    # With the lake, because what dbt parsed holds for one lake only, and is kept there from run to run.
    return Dbt(project_dir=str(PROJECT.project_dir), target_dir=str(config.home / "dbt"))


def _is_stale() -> bool:
    """Whether there is no manifest, or a file of the project is newer. A stale one has another graph than the run."""
    manifest = PROJECT.manifest_path
    if not manifest.exists():
        return True
    files = (file for pattern in _INPUTS for file in PROJECT.project_dir.glob(pattern) if file.is_file())
    return max(file.stat().st_mtime for file in files) > manifest.stat().st_mtime


def _invoke(project_dir: str, target: str, arguments: list[str], messages: list[dict[str, Any]]) -> Any:
    """Run dbt; its result has no usable types, hence `Any`."""
    from dbt.adapters.duckdb.connections import DuckDBConnectionManager  # noqa: PLC0415  # seconds; only a build pays
    from dbt.cli.main import dbtRunner  # noqa: PLC0415
    from dbt_common.events.functions import msg_to_dict  # noqa: PLC0415

    def keep(message: Any) -> None:  # Any: a class that protobuf makes
        if message.info.name in _RESULTS:
            messages.append(msg_to_dict(message))

    command = ["build", "--project-dir", project_dir, "--profiles-dir", project_dir, "--target-path", target]
    # The console's text is what Dagster keeps as the step's log; files of each run would pile up.
    command += ["--log-path", target, "--log-level-file", "none", "--no-write-json", *arguments]
    try:
        return dbtRunner(callbacks=[keep]).invoke(command)
    finally:
        # It would keep the lake attached for the life of the process.
        DuckDBConnectionManager.close_all_connections()  # type: ignore[no-untyped-call]  # dbt-duckdb has no types


def _failure(results: list[Any]) -> str:
    """Which nodes failed, with dbt's own words for each."""
    failed = [each for each in results if each.status in ("error", "fail", "runtime error")]
    listing = "\n".join(f"  - {each.node.unique_id}: {each.message}" for each in failed)
    return f"cannot build the models, {len(failed)} nodes failed; mend them and run the job again:\n{listing}"


@contextmanager
def _quiet() -> Iterator[None]:
    # It warns about its own internals and about what it imports; none of that is for our users.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
