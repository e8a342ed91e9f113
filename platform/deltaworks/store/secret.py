"""What DuckDB signs in with: secrets of one connection, in memory, never in an ATTACH and its errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import duckdb

from deltaworks.object_store import ObjectStore


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


def data_secret(store: ObjectStore) -> Secret:
    """The keys of a lake's data as DuckDB takes them, for this bucket only.

    Raises:
        ObjectStoreDeniedError: there are none.
    """
    keys = store.keys()
    options: dict[str, str | bool] = {
        "key_id": keys.access_key_id,
        "secret": keys.secret_access_key,
        "region": store.config.region,
        "scope": f"s3://{store.bucket}/",
    }
    if keys.session_token is not None:
        options["session_token"] = keys.session_token
    if store.config.endpoint is not None:
        scheme, _, host = store.config.endpoint.partition("://")
        options |= {"endpoint": host, "use_ssl": scheme == "https", "url_style": "path"}
    return Secret(kind="s3", name="lake_data", options=options)
