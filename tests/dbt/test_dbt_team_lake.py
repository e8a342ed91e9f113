"""dbt on a team's lake: the password and the keys come from `deltaworks.yaml`, not from the profile."""

import os
import subprocess
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo
from servers.object_store import KEY_ID, SECRET_KEY, Bucket
from servers.postgres import Database

from deltaworks.config import load
from deltaworks.operate import open_lake
from resources import environment

PROJECT = Path(__file__).parents[2] / "dbt_project"
CONFIG = """
sources: {studio: {kind: postgres, dsn: host=nowhere, tables: [person]}}
lake:
  catalog: "postgres:${CATALOG}"
  data: ADDRESS
  s3: {endpoint: "ENDPOINT", access_key_id: "${LAKE_KEY}", secret_access_key: "${LAKE_SECRET}"}
"""


def test_dbt_signs_in_to_a_team_lake_and_tells_no_secret(
    database: Database, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deltaworks.yaml"
    path.write_text(CONFIG.replace("ADDRESS", bucket.address).replace("ENDPOINT", bucket.endpoint))
    secrets = {"LAKE_KEY": KEY_ID, "LAKE_SECRET": SECRET_KEY, "CATALOG": make_conninfo(database.dsn, password="hushed")}
    for name, value in {**secrets, "DELTAWORKS_CONFIG": str(path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("DELTAWORKS_LAKE_CATALOG", "DELTAWORKS_LAKE_SIGNS_IN", "DELTAWORKS_EXTENSIONS"):
        monkeypatch.setenv(name, "")
    config = load(path, environment=os.environ)
    with open_lake(config) as lake:
        lake.connection.execute("create schema lake.studio")
        lake.connection.execute(
            "create table lake.studio.person (person_id integer, name varchar, born_on date, updated_at timestamptz, "
            "_commit ubigint, _committed_at timestamptz)"
        )
        lake.connection.execute("insert into lake.studio.person (person_id, name) values (1, 'Ada Ames')")
    environment.find_programs_beside_python()
    environment.export_lake(config)
    assert "hushed" not in os.environ["DELTAWORKS_LAKE_CATALOG"]
    folders = ["--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT), "--target-path", str(tmp_path / "target")]
    done = subprocess.run(
        ["dbt", "--debug", "run", "--select", "stg_person", *folders, "--log-path", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    with open_lake(config, read_only=True) as lake:
        assert lake.connection.execute("select name from lake.staging.stg_person").fetchall() == [("Ada Ames",)]
    told = done.stdout + done.stderr + (tmp_path / "logs" / "dbt.log").read_text()
    assert not [secret for secret in ("hushed", SECRET_KEY) if secret in told]
