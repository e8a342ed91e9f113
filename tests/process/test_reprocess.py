"""Asked on the command line, by Dagster or in code: done by the running service, or here where none runs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, ROLE
from process.material import Feed, TableSink, create
from typer.testing import CliRunner

from assets.reprocessed import reprocessed_documents
from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.process.asked import slice_of
from deltaworks.process.registry import load_app
from deltaworks.process.runner import Runner
from resources.deltaworks_config import DeltaworksConfig


@pytest.fixture
def path(films_path: Path, films_config: Config, service: FaultyService) -> Path:
    """A configuration of the app `films` over a local log with films 1 to 9; each was processed with old names."""
    service.names = dict.fromkeys(range(1, 10), "old")
    with LocalLogWriter.open(films_config.log_folder("studio")) as writer:
        feed = Feed(writer)
        for number in service.names:
            feed.commit(
                create(FILM, film_id=number, title="Alien", status="released"),
                create(ROLE, role_id=number, film_id=number, person_id=number),
            )
    operate.process(films_config, "films")
    service.names = dict.fromkeys(range(1, 10), "new")
    return films_path


@pytest.fixture
def config(path: Path, films_config: Config) -> Config:
    """As `path`."""
    assert path.exists()
    return films_config


def made_anew(sink: TableSink) -> set[int]:
    return {key for key, body in sink.bodies().items() if body["cast"] == ["new"]}


def test_without_a_service_the_caller_does_it(config: Config, sink: TableSink) -> None:
    answered = operate.reprocess(config, "films", keys=[2, 3])

    assert answered.answered_by == "this run"
    assert made_anew(sink) == {2, 3}


@pytest.mark.usefixtures("path", "running")
def test_the_running_service_does_it(config: Config, sink: TableSink) -> None:
    seen: list[tuple[int, int]] = []
    answered = operate.reprocess(config, "films", on_progress=lambda done, total: seen.append((done, total)))

    assert answered.outcome.count == 9
    assert answered.answered_by == "the process service"
    assert made_anew(sink) == set(range(1, 10))


def test_the_command_line_takes_keys_and_says_which_are_unknown(path: Path, sink: TableSink) -> None:
    keys = path.with_name("keys.txt")
    keys.write_text("5\n99\n")
    done = CliRunner().invoke(
        command_line, ["process", "films", "--config", str(path), "--keys", "2,3", "--keys", f"@{keys}"]
    )

    assert made_anew(sink) == {2, 3, 5}
    assert done.exit_code == 1


@pytest.mark.parametrize("keys", [[], ["7"]])
def test_a_dagster_partition_is_a_part_of_the_keys_and_a_run_may_name_keys(
    keys: list[str], path: Path, config: Config, sink: TableSink
) -> None:
    done = dg.materialize(
        [reprocessed_documents("films", config)],
        partition_key="03",
        resources={"deltaworks": DeltaworksConfig(path=str(path))},
        run_config={"ops": {"reprocessed__films": {"config": {"keys": keys}}}},
        selection=[dg.AssetKey(["reprocessed", "films"])],
    )

    wanted = {7} if keys else {key for key in range(1, 10) if slice_of(key, 16) == 3}
    assert made_anew(sink) == wanted
    [materialized] = done.get_asset_materialization_events()
    assert materialized.materialization.metadata["dagster/partition_row_count"].value == len(wanted)


def test_a_run_that_waits_for_another_does_the_work_itself_when_that_goes_away(
    films_config: Config, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "new"}
    with LocalLogWriter.open(films_config.log_folder("studio")) as writer:
        Feed(writer).commit(create(FILM, film_id=1, title="Alien", status="released"))
    with ThreadPoolExecutor(1) as pool:
        with Runner.open(load_app(films_config, "films"), config=films_config, name="films"):
            processed = pool.submit(operate.process, films_config, "films")
            with pytest.raises(TimeoutError):
                processed.result(timeout=1.0)
        assert processed.result(timeout=10.0).processed_by == "this run"
    assert sink.bodies().keys() == {1}
