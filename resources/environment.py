"""The one place that reads environment names, and the one that sets them for child processes."""

import os
import sys
from pathlib import Path

from deltaworks.config import Config, load
from deltaworks.store.address import LakeAddress

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


def find_programs_beside_python() -> None:
    """Let child processes be found in this environment, also where nobody activated it."""
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if beside not in path.split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + path


def export_lake(config: Config) -> None:
    """Tell dbt where the lake of this configuration is; what it signs in with, `dbt_lake` gives to its connection."""
    address = LakeAddress.from_config(config)
    os.environ["DELTAWORKS_LAKE_CATALOG"] = address.catalog
    if address.login is not None or address.store is not None:
        os.environ["DELTAWORKS_LAKE_SIGNS_IN"] = "yes"
    else:
        os.environ.pop("DELTAWORKS_LAKE_SIGNS_IN", None)
    os.environ["DELTAWORKS_EXTENSIONS"] = str(config.extension_folder)
