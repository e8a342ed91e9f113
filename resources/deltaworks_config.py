"""The engine's configuration as a Dagster resource."""

from pathlib import Path

import dagster as dg

from deltaworks.config import Config
from resources import environment


class DeltaworksConfig(dg.ConfigurableResource):  # type: ignore[type-arg]  # the value is the resource itself
    """Where `deltaworks.yaml` is; every asset hands its content to the engine."""

    path: str

    def load(self) -> Config:
        """Read and check the file.

        Raises:
            ConfigError: with all faults at once.
        """
        return environment.config(Path(self.path))
