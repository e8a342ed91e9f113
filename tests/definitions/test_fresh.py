"""What Dagster is told of how fresh a source is: by its canary, also while nobody writes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml
from process.material import wait_until
from servers.postgres import Database

from assets.definitions import build
from assets.fresh import FRESH, freshness_check
from deltaworks import operate
from deltaworks.config import Config, load
from deltaworks.log.canary import Canary
from deltaworks.log.registry import log_of, open_reader
from resources.deltaworks_config import DeltaworksConfig
from sensors.source_fresh import TELL_EVERY_S, Memory, is_worth_telling, source_fresh_sensor

EVERY_S, PATIENCE_S = 1.0, 60.0


@pytest.fixture
def config_path(database: Database, tmp_path: Path) -> Path:
    database.execute("create table film (id int primary key)", "create table person (id int primary key)")
    path = tmp_path / "deltaworks.yaml"
    source = {"kind": "postgres", "dsn": database.dsn, "tables": ["film", "person"], "canary_s": EVERY_S}
    path.write_text(yaml.safe_dump({"home": str(tmp_path / "home"), "sources": {"shop": source}}))
    return path


@pytest.fixture
def config(config_path: Path) -> Config:
    return load(config_path, environment={})


def newest(config: Config) -> Canary | None:
    return Canary.of(open_reader(config, "shop").end().progress)


@contextmanager
def service(config: Config) -> Iterator[None]:
    """The capture service, from when a canary of its own came through."""
    before, stop = newest(config), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(operate.follow_capture, config, "shop", stop=stop)
        try:
            wait_until(lambda: newest(config) != before, timeout_s=PATIENCE_S)
            yield
        finally:
            stop.set()
            running.result(timeout=PATIENCE_S)


def wait_for_overdue(config: Config) -> None:
    def is_overdue() -> bool:
        canary = operate.capture_status(config, "shop").canary
        return canary is not None and canary.is_overdue

    wait_until(is_overdue, timeout_s=PATIENCE_S)


def checked(config: Config, config_path: Path) -> list[dg.AssetCheckEvaluation]:
    done = dg.Definitions(
        asset_checks=[check := freshness_check("shop", config.source("shop"))],
        jobs=[dg.define_asset_job("fresh", selection=dg.AssetSelection.checks(check))],
        resources={"deltaworks": DeltaworksConfig(path=str(config_path))},
    )
    return list(done.resolve_job_def("fresh").execute_in_process().get_asset_check_evaluations())


def test_the_check_fails_while_a_service_runs_and_its_canaries_do_not_come_through(
    config: Config, config_path: Path
) -> None:
    with service(config):
        fresh = checked(config, config_path)
    assert {(each.asset_key.path[-1], each.check_name, each.passed) for each in fresh} == {
        ("film", FRESH, True),
        ("person", FRESH, True),
    }
    told = {name: value.value for name, value in fresh[0].metadata.items()}
    assert set(told) == {"canary_age_s", "canary_took_s", "canary_position", "limit_s", "lag_s"}
    assert told["limit_s"] == pytest.approx(3 * EVERY_S + told["canary_took_s"], abs=0.001)

    # Whoever holds the log now writes nothing: that is what a service that hangs looks like.
    with log_of(config, "shop").writer():
        wait_for_overdue(config)
        stuck = checked(config, config_path)
    assert [each.passed for each in stuck] == [False, False]
    assert "does not come through" in (stuck[0].description or "")
    # It is known how long ago, and a service that was stopped on purpose is none that hangs.
    assert stuck[0].metadata["canary_age_s"].value > stuck[0].metadata["limit_s"].value
    stopped = checked(config, config_path)
    assert [each.passed for each in stopped] == [True, True]
    assert "no service" in (stopped[0].description or "")


def test_a_source_without_canaries_and_one_that_is_away_have_a_check_that_says_so(
    database: Database, config: Config, config_path: Path
) -> None:
    operate.capture(config, "shop")
    (film, _) = checked(config, config_path)
    assert film.passed
    assert "no canary" in (film.description or "")
    assert set(film.metadata) == {"lag_s"}
    away = config_path.read_text().replace(database.dsn, "host=127.0.0.1 port=1 dbname=nowhere")
    config_path.write_text(away)
    (film, _) = checked(config, config_path)
    assert "the source does not answer" in (film.description or "")
    assert set(film.metadata) == set()


def test_the_sensor_tells_without_a_run_when_the_pipe_stands_and_when_it_goes_on(
    config: Config, config_path: Path
) -> None:
    resources = {"deltaworks": DeltaworksConfig(path=str(config_path))}
    sensor = source_fresh_sensor("shop")
    cursor: str | None = None

    def tick() -> dict[str, bool]:
        nonlocal cursor
        with dg.DagsterInstance.ephemeral() as instance:
            result = sensor(dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources))
        if isinstance(result, dg.SkipReason):
            return {}
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        cursor = result.cursor
        events = [event for event in result.asset_events if isinstance(event, dg.AssetCheckEvaluation)]
        assert {event.check_name for event in events} <= {FRESH}
        return {event.asset_key.path[-1]: event.passed for event in events}

    with service(config):
        assert tick() == {"film": True, "person": True}
        assert tick() == {}
    with log_of(config, "shop").writer():
        wait_for_overdue(config)
        assert tick() == {"film": False, "person": False}
        assert tick() == {}
    with service(config):
        assert tick() == {"film": True, "person": True}


@pytest.mark.parametrize(
    ("memory", "is_fresh", "worth"),
    [
        (Memory(), True, True),
        (Memory(told=True, told_at=100.0), True, False),
        (Memory(told=True, told_at=100.0), False, True),
        (Memory(told=True, told_at=100.0 - TELL_EVERY_S), True, True),
    ],
)
def test_what_is_known_is_told_again_after_a_while_only(memory: Memory, *, is_fresh: bool, worth: bool) -> None:
    assert is_worth_telling(memory, is_fresh=is_fresh, now=100.0) == worth


@pytest.mark.filterwarnings("ignore:Parameter `owners` of initializer:Warning")
def test_it_is_a_check_of_every_captured_table_and_no_reason_to_stop_a_load(config_path: Path) -> None:
    definitions = build(config_path)
    specs = {
        spec.asset_key.to_user_string(): spec
        for check in definitions.asset_checks or ()
        for spec in check.check_specs
        if spec.name == FRESH
    }
    assert set(specs) == {"captured/shop/film", "captured/shop/person"}
    assert not any(spec.blocking for spec in specs.values())
    assert "source_fresh_shop" in {sensor.name for sensor in definitions.sensors or ()}
