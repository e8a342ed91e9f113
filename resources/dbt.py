"""dbt, run as dagster-dbt runs it."""

from functools import cached_property
from importlib.metadata import version as installed_version

from dagster_dbt import DbtCliResource, DbtProject
from packaging import version

from deltaworks.config import Config
from resources import environment

PROJECT = DbtProject(project_dir=environment.ROOT / "dbt_project")
_INPUTS = ("dbt_project.yml", "profiles.yml", "models/**/*", "macros/**/*", "tests/**/*")


class Dbt(DbtCliResource):
    """The dbt of this environment."""

    @cached_property
    def _cli_version(self) -> version.Version:
        """The version of the package; dagster-dbt asks `dbt --version`, which takes seconds in every run."""
        return version.parse(installed_version("dbt-core"))


def prepared_project() -> DbtProject:
    """The project with a manifest of what it is now; parsing it takes some seconds, so only when it changed."""
    environment.find_programs_beside_python()
    if _is_stale():
        PROJECT.preparer.prepare(PROJECT)
    return PROJECT


def dbt_cli(config: Config) -> Dbt:
    """The command line of this project, pointed at the lake of this configuration."""
    environment.find_programs_beside_python()
    environment.export_lake(config)
    return Dbt(project_dir=str(PROJECT.project_dir))


def _is_stale() -> bool:
    """Whether there is no manifest, or a file of the project is newer. A stale one has another graph than the run."""
    manifest = PROJECT.manifest_path
    if not manifest.exists():
        return True
    files = (file for pattern in _INPUTS for file in PROJECT.project_dir.glob(pattern) if file.is_file())
    return max(file.stat().st_mtime for file in files) > manifest.stat().st_mtime
