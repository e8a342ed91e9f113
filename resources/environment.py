"""The one place that reads environment names, and the one that sets them for child processes."""

import os
from pathlib import Path

from deltaworks.config import Config, load

ROOT = Path(__file__).resolve().parent.parent


def config_path() -> Path:
    """`DELTAWORKS_CONFIG`, or the `deltaworks.yaml` of this checkout."""
    return Path(os.environ.get("DELTAWORKS_CONFIG", ROOT / "deltaworks.yaml"))


def config(path: Path | None = None) -> Config:
    """The configuration, checked.

    Raises:
        ConfigError: with all faults at once.
    """
    return load(path or config_path(), environment=os.environ)


def export_lake(config: Config) -> None:
    """Tell dbt, a child process, where the lake of this configuration is."""
    os.environ["DELTAWORKS_LAKE_CATALOG"] = config.lake_catalog
    os.environ["DELTAWORKS_EXTENSIONS"] = str(config.extension_folder)
