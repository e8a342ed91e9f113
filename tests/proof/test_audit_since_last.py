"""An audit that goes on where the last one ended, and what Dagster makes of what it finds."""

from pathlib import Path

import dagster as dg
import pytest
from proof.shop import bring_through, fill, of_group
from servers.postgres import Database

from assets.audited import NOTHING_LOST, loss_check, repair_job
from deltaworks import operate
from deltaworks.config import Config
from deltaworks.log.local import LocalLogReader
from deltaworks.testing.faults import lose_at
from resources.deltaworks_config import DeltaworksConfig
from sensors.changes_lost import RETRY_AFTER_S, Memory, changes_lost_sensor, needs_repair


def lose(config: Config, key: int) -> None:
    """Load what is new, but for the change of this item."""
    gone: list[int] = []
    operate.capture(config, "shop")
    with lose_at("load.read", lambda groups: [of_group(group, {key}, gone) for group in groups]):
        operate.load(config, "shop")
    assert gone == [key]


def test_it_reads_what_is_new_and_finds_what_is_lost_of_it(
    config: Config, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database, 100)
    bring_through(config)
    whole = operate.audit(config, "shop")
    assert whole.hops[0].arrived.counts == {"public.item": 100}
    assert operate.unaudited(config, "shop") == 0

    database.execute("insert into item select i, 'new', 9 from generate_series(101, 110) i")
    lose(config, 105)
    assert operate.unaudited(config, "shop") == 10
    found = operate.audit(config, "shop", is_since_last=True)
    assert found.hops[0].arrived.counts == {"public.item": 10}
    assert [incident.loss.keys for incident in found.found] == [{"public.item": (("105",),)}]
    # It stays open until it is repaired, though no later look reads its groups again.
    again = operate.audit(config, "shop", is_since_last=True)
    assert (again.hops[0].arrived.counts, again.found, len(again.open)) == ({}, [], 1)
    # A whole audit is still one, and tells of no loss twice.
    assert operate.audit(config, "shop").found == []

    operate.repair(config, "shop")
    bring_through(config)
    assert operate.audit(config, "shop", is_since_last=True).is_balanced
    reads: list[int] = []
    read = LocalLogReader.read

    def counted(reader: LocalLogReader, *, after_sequence: int, max_changes: int | None = None) -> object:
        for group in read(reader, after_sequence=after_sequence, max_changes=max_changes):
            reads.append(group.header.next_offset - group.header.offset)
            yield group

    monkeypatch.setattr(LocalLogReader, "read", counted)
    assert operate.audit(config, "shop", is_since_last=True).is_balanced
    # One group of each of the two logs, to know that it is the log that was audited.
    assert len(reads) <= 2


def test_an_app_that_began_anew_is_compared_from_its_start(config: Config, database: Database) -> None:
    fill(database, 100)
    bring_through(config)
    assert operate.audit(config, "shop").is_balanced
    for file in config.app_folder("items").glob("state.sqlite*"):
        file.unlink()
    gone: list[int] = []
    with lose_at("process.read", lambda groups: [of_group(group, {7}, gone) for group in groups]):
        operate.process(config, "items")
    found = operate.audit(config, "shop", is_since_last=True)
    assert [incident.loss.hop for incident in found.found] == ["app items"]


def test_a_repair_is_asked_for_once_for_each_incident_and_again_much_later() -> None:
    asked = Memory(asked_for=("a",), asked_at=1_000.0)
    assert needs_repair(Memory(), ("a",), now=1_000.0)
    assert not needs_repair(asked, ("a",), now=1_001.0)
    assert needs_repair(asked, ("a", "b"), now=1_001.0)
    assert needs_repair(asked, ("a",), now=1_000.0 + RETRY_AFTER_S)
    assert not needs_repair(asked, (), now=1_000.0 + RETRY_AFTER_S)


# Dagster passes its own beta parameter on when it takes a sensor of several jobs.
@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")
def test_a_loss_fails_the_check_of_its_table_and_its_repair_lets_it_pass(
    config: Config, config_file: Path, database: Database
) -> None:
    settings = config.source("shop")
    check, repair = loss_check("shop", settings), repair_job("shop")
    resources = {"deltaworks": DeltaworksConfig(path=str(config_file))}
    audit = dg.define_asset_job("audit_shop", selection=dg.AssetSelection.checks(check))
    sensor = changes_lost_sensor("shop", audit_job=audit, repair_job=repair)
    definitions = dg.Definitions(asset_checks=[check], jobs=[audit, repair], sensors=[sensor], resources=resources)
    operate.capture(config, "shop")
    fill(database, 10)
    lose(config, 5)

    with dg.DagsterInstance.ephemeral() as instance:
        cursor: str | None = None

        def tick() -> tuple[list[str], dict[str, bool]]:
            nonlocal cursor
            context = dg.build_sensor_context(
                instance=instance, cursor=cursor, resources=resources, definitions=definitions
            )
            result = sensor(context)
            assert isinstance(result, dg.SensorResult)
            cursor = result.cursor
            verdicts = [event for event in result.asset_events if isinstance(event, dg.AssetCheckEvaluation)]
            told = {event.asset_key.path[-1]: event.passed for event in verdicts}
            return [str(request.job_name) for request in result.run_requests or ()], told

        assert tick() == (["repair_shop"], {"item": False, "part": True})
        assert tick() == ([], {})
        checked = definitions.resolve_job_def("audit_shop").execute_in_process(instance=instance)
        verdicts = {each.asset_key.path[-1]: each.passed for each in checked.get_asset_check_evaluations()}
        assert verdicts == {"item": False, "part": True}
        assert {each.check_name for each in checked.get_asset_check_evaluations()} == {NOTHING_LOST}

        assert definitions.resolve_job_def("repair_shop").execute_in_process(instance=instance).success
        assert tick() == ([], {"item": True, "part": True})
    bring_through(config)
    assert operate.verify(config, "shop").is_equal
