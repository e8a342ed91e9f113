"""Dagster shows what `deltaworks check` says of a source's server."""

from pathlib import Path

import dagster as dg
import yaml
from servers.postgres import Database

from assets.captured import source_tables
from assets.readiness import SERVER_READY, readiness_check
from deltaworks.config import load
from resources.deltaworks_config import DeltaworksConfig


def test_a_table_that_cannot_be_captured_fails_its_check_with_the_statement_that_mends_it(
    database: Database, tmp_path: Path
) -> None:
    database.execute("create table keyed (id int primary key)", "create table keyless (id int)")
    path = tmp_path / "deltaworks.yaml"
    tables = ["keyed", "keyless"]
    source = {"kind": "postgres", "dsn": database.dsn, "tables": tables, "slot": database.name}
    path.write_text(yaml.safe_dump({"sources": {"shop": source}}))
    settings = load(path, environment={}).source("shop")
    specs, check = source_tables("shop", settings), readiness_check("shop", settings)

    def run() -> list[dg.AssetCheckEvaluation]:
        with dg.DagsterInstance.ephemeral() as instance:
            result = dg.Definitions(
                assets=specs,
                asset_checks=[check],
                jobs=[dg.define_asset_job("ready", selection=dg.AssetSelection.checks(check))],
                resources={"deltaworks": DeltaworksConfig(path=str(path))},
            ).resolve_job_def("ready")
            return result.execute_in_process(instance=instance).get_asset_check_evaluations()

    found = run()
    assert [(each.check_name, each.passed) for each in found] == [(SERVER_READY, False)] * 2
    said = str(found[0].metadata["findings"].value)
    assert "error: table public.keyless has no primary key" in said
    assert "warning: max_slot_wal_keep_size is unlimited" in said
    database.execute("alter table keyless add primary key (id)")
    assert [each.passed for each in run()] == [True, True]
