"""How fresh each place is, also when all is idle, and what Prometheus hears of it and of losses."""

import threading
from concurrent.futures import ThreadPoolExecutor

from process.material import wait_until
from prometheus_client import CollectorRegistry, generate_latest
from proof.shop import bring_through, fill, of_group
from servers.postgres import Database

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.log.canary import Canary, canary_at
from deltaworks.log.registry import open_reader
from deltaworks.operate.audit_metrics import AuditCollector
from deltaworks.operate.freshness import AgeCollector
from deltaworks.process.standing import read_standings
from deltaworks.testing.faults import lose_at


def ages(config: Config) -> dict[str, float | None]:
    captured = operate.capture_statuses(config)
    return {row.what: row.age_s for row in operate.status(config, captured=captured)}


def samples(collector: AuditCollector | AgeCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_every_place_says_how_old_what_it_lacks_may_be(config: Config, database: Database) -> None:
    fill(database, 10)
    bring_through(config)
    # Nothing is written any more, yet each place is known to be as fresh as the log is.
    idle = ages(config)
    known = {"log shop", "lake shop", "app items", "log items", "lake items"}
    assert {place for place, age in idle.items() if age is not None} == known
    assert len({round(age, 1) for age in idle.values() if age is not None}) == 1

    database.execute("insert into item values (11, 'new', 9)")
    operate.capture(config, "shop")
    behind = ages(config)
    assert min(behind[place] or 0.0 for place in known - {"log shop"}) > (behind["log shop"] or 0.0)
    assert samples(AgeCollector(config, "items"))["deltaworks_process_age_seconds"] > 0
    operate.process(config, "items")
    processed = ages(config)
    assert processed["app items"] == processed["log shop"]
    assert (processed["lake items"] or 0.0) > (processed["app items"] or 0.0)


def test_losses_are_metrics_until_they_are_repaired(config: Config, database: Database) -> None:
    operate.capture(config, "shop")
    fill(database, 10)
    operate.capture(config, "shop")
    gone: list[int] = []
    with lose_at("load.read", lambda groups: [of_group(group, {3, 4}, gone) for group in groups]):
        operate.load(config, "shop")
    collector = AuditCollector(config, "shop")
    assert samples(collector) == {
        "deltaworks_audit_open_incidents": 0,
        "deltaworks_audit_lost_changes": 0,
        "deltaworks_audit_unseen_changes": 10,
    }
    operate.audit(config, "shop")
    found = samples(collector)
    assert found["deltaworks_audit_open_incidents"] == 1
    assert found["deltaworks_audit_lost_changes"] == 2
    assert found["deltaworks_audit_unseen_changes"] == 0
    operate.repair(config, "shop")
    assert samples(collector)["deltaworks_audit_open_incidents"] == 0


def test_a_canary_of_the_service_reaches_the_sinks_of_an_app_while_nobody_writes(
    config: Config, database: Database
) -> None:
    fill(database, 10)
    watched = config.source("shop").model_copy(update={"canary_s": 0.05})
    config = config.model_copy(update={"sources": {"shop": watched}})
    stop = threading.Event()

    def newest() -> Canary | None:
        return Canary.of(open_reader(config, "shop").end().progress)

    with ThreadPoolExecutor(1) as pool:
        service = pool.submit(operate.follow_capture, config, "shop", stop=stop)
        try:
            wait_until(lambda: newest() is not None, timeout_s=60)
            operate.process(config, "items")
            first = canary_of("items", config)
            seen = newest()
            wait_until(lambda: newest() != seen, timeout_s=60)
            operate.process(config, "items")
            assert canary_of("items", config).position > first.position
        finally:
            stop.set()
            service.result(timeout=60)
    assert samples(AgeCollector(config, "items"))["deltaworks_process_canary_age_seconds"] > 0
    captured = operate.capture_statuses(config)
    (row,) = [row for row in operate.status(config, captured=captured) if row.what == "app items"]
    assert row.state.startswith("canary ")


def canary_of(app: str, config: Config) -> Canary:
    standings = read_standings(config.app_folder(app))
    found = canary_at(open_reader(config, "shop"), sequence=standings.sequence, reached=standings.reached)
    assert found is not None
    return found
