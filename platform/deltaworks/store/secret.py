"""What DuckDB signs in with: secrets of one connection, in memory, never in an ATTACH and its errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import duckdb


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A secret as `create secret` takes it; its options are hidden in `repr`.

    >>> Secret(kind="s3", name="lake_data", options={"secret": "hunter2"})
    Secret(kind='s3', name='lake_data')
    """

    kind: str
    name: str
    options: Mapping[str, str | bool] = field(repr=False)

    def create(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Give it to a connection that has the extension of this kind; it ends with the connection."""
        # The options' names are ours, their values are parameters.
        options = ", ".join((f"type {self.kind}", *(f"{option} ?" for option in self.options)))
        connection.execute(f"create or replace temporary secret {self.name} ({options})", list(self.options.values()))
