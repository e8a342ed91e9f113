"""The lake's object store as a Dagster resource: usable by any asset, and it shows no key to anybody."""

from pathlib import Path

import dagster as dg
import pytest
from servers.object_store import KEY_ID, SECRET_KEY, Bucket

from resources.object_store import ObjectStore

CONFIG = """
sources: {shop: {kind: postgres, dsn: host=nowhere, tables: [item]}}
lake: {data: "ADDRESS", s3: {endpoint: "ENDPOINT", access_key_id: "${LAKE_KEY}", secret_access_key: "${LAKE_SECRET}"}}
"""


@dg.asset
def poster(object_store: ObjectStore) -> dg.MaterializeResult:
    client = object_store.client()
    client.put_object(Bucket=(name := client.list_buckets()["Buckets"][0]["Name"]), Key="poster.png", Body=b"png")
    return dg.MaterializeResult(metadata={"bucket": name})


def test_an_asset_uses_the_lakes_store_and_no_event_has_a_key(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deltaworks.yaml"
    path.write_text(CONFIG.replace("ADDRESS", bucket.address).replace("ENDPOINT", bucket.endpoint))
    monkeypatch.setenv("LAKE_KEY", KEY_ID)
    monkeypatch.setenv("LAKE_SECRET", SECRET_KEY)
    resource = ObjectStore(path=str(path))
    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize([poster], resources={"object_store": resource}, instance=instance)
        assert done.success
        told = [str(entry) for entry in instance.all_logs(done.run_id)]
    told += [repr(resource), str(resource)]
    assert not [text for text in told if SECRET_KEY in text or KEY_ID in text]
