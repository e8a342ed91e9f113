"""The job as Dagster runs it: from the source to a release, and what stops a release."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from flows.chain import Studio

from deltaworks import operate
from studio.updates import apply_updates

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.slow,
    # dagster-dbt itself still calls what Dagster has deprecated.
    pytest.mark.filterwarnings("ignore:AssetExecutionContext.op is deprecated:DeprecationWarning"),
    # And hands an argument on that it calls beta, where a sensor has several jobs.
    pytest.mark.filterwarnings("ignore:Parameter `owners` of initializer `SensorDefinition:dagster.BetaWarning"),
]


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    # In memory: a run stores hundreds of events, each a transaction of its own.
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as made:
        yield made


@pytest.fixture
def definitions(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    # What dbt, a child process, is told; put back at the end of the test.
    for name in ("DELTAWORKS_LAKE_CATALOG", "DELTAWORKS_EXTENSIONS"):
        monkeypatch.setenv(name, "replaced")
    build: Any = importlib.import_module("assets.definitions").build
    return build(studio.config_path)  # type: ignore[no-any-return]


def run_job(definitions: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = definitions.resolve_job_def("load_studio")
    return job.execute_in_process(instance=instance, raise_on_error=False)


def evaluate_sensor(definitions: dg.Definitions, instance: dg.DagsterInstance, cursor: str | None) -> Any:
    """One tick: its run requests, its cursor, and why it skipped."""
    sensor = definitions.resolve_sensor_def("log_ahead_studio")
    context = dg.build_sensor_context(
        instance=instance,
        cursor=cursor,
        resources={"deltaworks": definitions.resources["deltaworks"]},  # type: ignore[index]
        definitions=definitions,
    )
    return sensor.evaluate_tick(context)


def released_title(studio: Studio, movie_id: int) -> str:
    with operate.open_lake(studio.config, read_only=True) as lake:
        row = lake.connection.execute("select title from lake.prod.film where movie_id = ?", [movie_id]).fetchone()
    assert row is not None
    return str(row[0])


def check_columns_are_traced_to_the_source(instance: dg.DagsterInstance) -> None:
    """From the released model back, by the metadata that the run left."""

    def upstream(asset: dg.AssetKey, column: str) -> set[tuple[dg.AssetKey, str]]:
        event = instance.get_latest_materialization_event(asset)
        assert event is not None
        assert event.asset_materialization is not None
        lineage = event.asset_materialization.metadata["dagster/column_lineage"].value
        return {(dep.asset_key, dep.column_name) for dep in lineage.deps_by_column[column]}

    key = dg.AssetKey
    assert upstream(key(["modeled", "film"]), "title") == {(key(["modeled", "int_film"]), "title")}
    assert upstream(key(["modeled", "int_film"]), "title") == {(key(["modeled", "stg_movie"]), "title")}
    assert upstream(key(["modeled", "stg_movie"]), "title") == {(key(["stored", "studio", "movie"]), "title")}
    assert upstream(key(["stored", "studio", "movie"]), "title") == {(key(["captured", "studio", "movie"]), "title")}
    assert upstream(key(["captured", "studio", "movie"]), "title") == {(key(["studio", "movie"]), "title")}
    assert upstream(key(["enriched", "movie_search", "movies"]), "title") == {
        (key(["captured", "studio", "movie"]), "title")
    }
    assert (key(["captured", "studio", "person"]), "name") in upstream(
        key(["enriched", "movie_search", "movies"]), "directors"
    )


def test_the_job_releases_what_the_source_has_and_nothing_that_fails_an_expectation(
    studio: Studio, definitions: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    studio.start_talent()
    first = evaluate_sensor(definitions, instance, None)
    assert len(first.run_requests) == 1

    result = run_job(definitions, instance)
    assert result.success
    evaluations = result.get_asset_check_evaluations()
    assert evaluations
    assert all(evaluation.passed for evaluation in evaluations)
    release = operate.released(studio.config)
    assert release is not None
    assert release.evidence["run_id"] == result.run_id
    assert len(release.evidence["checks"]) == len(evaluations)
    assert {"film", "director_career", "movies"} <= set(release.views)
    check_columns_are_traced_to_the_source(instance)

    skipped = evaluate_sensor(definitions, instance, first.cursor)
    assert not skipped.run_requests
    assert "at the end of the log" in skipped.skip_message

    apply_updates(studio.database.dsn, rate=2_000, seconds=0.1, seed=5)
    # A sensor that remembers nothing: loads keep their distance, which test_log_ahead.py shows.
    again = evaluate_sensor(definitions, instance, None)
    assert len(again.run_requests) == 1
    waiting = evaluate_sensor(definitions, instance, again.cursor)
    assert "already asked" in waiting.skip_message

    assert run_job(definitions, instance).success
    newer = operate.released(studio.config)
    assert newer is not None
    assert newer.version > release.version
    assert operate.verify(studio.config, "studio").is_equal
    check_what_fails_keeps_the_previous_release(studio, definitions, instance)


def check_what_fails_keeps_the_previous_release(
    studio: Studio, definitions: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    """After a release, so that what costs most of a first run is paid once; the run says why it failed."""
    before = operate.released(studio.config)
    assert before is not None
    [(movie_id, title)] = studio.database.rows("select movie_id, title from movie order by movie_id limit 1")

    # The database lets an implausible running time through; the expectation does not.
    studio.database.execute(
        f"update movie set title = 'Endless', runtime_min = 1501 where movie_id = {movie_id}",
    )
    result = run_job(definitions, instance)

    assert not result.success
    failed = [evaluation for evaluation in result.get_asset_check_evaluations() if not evaluation.passed]
    assert [evaluation.check_name for evaluation in failed] == ["movie_values"]
    assert "runtime_min" in (failed[0].description or "")
    assert operate.released(studio.config) == before
    assert released_title(studio, movie_id) == title
    # What was loaded is there to look at; it is only not released.
    assert operate.verify(studio.config, "studio").is_equal

    studio.database.execute(f"update movie set runtime_min = 90 where movie_id = {movie_id}")
    assert run_job(definitions, instance).success
    assert released_title(studio, movie_id) == "Endless"
