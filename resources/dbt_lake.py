"""What dbt's DuckDB has to know before it attaches a team's lake; a plug-in of dbt-duckdb, named in `profiles.yml`.

Keys go from `deltaworks.yaml` into the connection, so that neither a profile nor dbt's logs have them.
"""

import duckdb
from dbt.adapters.duckdb.plugins import BasePlugin

from deltaworks.store.address import LakeAddress
from resources import environment


class Plugin(BasePlugin):
    """Signs dbt's connection in, where the lake needs it."""

    def configure_connection(self, conn: duckdb.DuckDBPyConnection) -> None:
        """Create the lake's secrets; called once for each connection, before the lake is attached."""
        for secret in LakeAddress.from_config(environment.config()).secrets():
            secret.create(conn)
