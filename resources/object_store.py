"""The object store of the lake, for assets of your own: the client that dagster-aws makes, on the lake's service.

    @dg.asset
    def posters(object_store: ObjectStore) -> None:
        object_store.client().put_object(Bucket=…, Key=…, Body=…)

The resource holds the path of `deltaworks.yaml` and no key, so none is in Dagster's pages or its event log.
"""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import SecretStr

from resources import environment


class ObjectStore(dg.ConfigurableResource):  # type: ignore[type-arg]  # the value is the resource itself
    """The service that `lake.s3` describes; a plain install has no library for it, so it is asked for when used."""

    path: str

    def client(self) -> Any:  # Any: boto3 makes its clients at run time and declares no types
        """A boto3 client with the lake's endpoint, region and keys.

        Raises:
            ConfigError: with all faults of the configuration at once.
        """
        from dagster_aws.s3 import S3Resource  # noqa: PLC0415  # half a second, and in the extra [aws]

        s3 = environment.config(Path(self.path)).lake.s3
        return S3Resource(
            endpoint_url=s3.endpoint,
            region_name=s3.region,
            aws_access_key_id=_told(s3.access_key_id),
            aws_secret_access_key=_told(s3.secret_access_key),
            aws_session_token=_told(s3.session_token),
        ).get_client()


def _told(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
