"""`deltaworks dead`, with and without a running service, and what Dagster shows of it."""

import json
from pathlib import Path

import dagster as dg
import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, ROLE
from process.material import Feed, TableSink, create, wait_until
from typer.testing import CliRunner, Result

from assets.dead import dead_letters
from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from resources.deltaworks_config import DeltaworksConfig


@pytest.fixture
def path(films_path: Path, films_config: Config, service: FaultyService) -> Path:
    """An app over films 1 to 4, of which 2 and 3 are dead letters; what refused them has been mended since."""
    service.names = {number: f"person {number}" for number in range(1, 5)}
    service.fault = lambda ids: 404 if {2, 3} & set(ids) else None
    with LocalLogWriter.open(films_config.log_folder("studio")) as writer:
        Feed(writer).commit(
            *(create(FILM, film_id=number, title="secret title", status="released") for number in service.names),
            *(create(ROLE, role_id=number, film_id=number, person_id=number) for number in service.names),
        )
    operate.process(films_config, "films")
    service.fault = lambda ids: None
    return films_path


def dead(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command_line, ["dead", *arguments, "--config", str(path)])


def test_rows_are_shown_only_to_who_asks_for_them(path: Path) -> None:
    assert dead(path, "ls", "films").exit_code == 0
    plain = json.loads(dead(path, "show", "films", "2").stdout)
    full = json.loads(dead(path, "show", "films", "2", "--rows").stdout)

    assert [(letter["key"], letter["step"], letter["attempts"]) for letter in plain["letters"]] == [(2, "people", 1)]
    assert "secret title" not in json.dumps(plain) + dead(path, "ls", "films").stdout
    assert full["rows"]["film"] == [{"_key": 2, "title": "secret title", "status": "released"}]
    assert isinstance(dead(path, "show", "films", "1").exception, operate.NoDeadLetterError)


def test_without_a_service_the_command_retries_and_drops(path: Path, films_config: Config, sink: TableSink) -> None:
    assert dead(path, "retry", "films", "2").exit_code == 0
    assert sink.bodies().keys() == {1, 2, 4}
    assert dead(path, "drop", "films").exit_code == 2
    assert dead(path, "drop", "films", "3").exit_code == 0
    assert dead(path, "drop", "films", "3").exit_code == 1

    assert operate.dead_letters(films_config, "films") == []
    assert sink.bodies().keys() == {1, 2, 4}


@pytest.mark.usefixtures("path", "running")
def test_the_running_service_retries(path: Path, sink: TableSink) -> None:
    assert dead(path, "retry", "films").exit_code == 0

    wait_until(lambda: sink.bodies().keys() == {1, 2, 3, 4})


def test_dagster_counts_them_by_step_and_warns(path: Path, films_config: Config) -> None:
    done = dg.materialize(
        [dead_letters("films", films_config)], resources={"deltaworks": DeltaworksConfig(path=str(path))}
    )

    [materialized] = done.get_asset_materialization_events()
    metadata = materialized.materialization.metadata
    assert (metadata["dagster/row_count"].value, metadata["by_step"].value) == (2, {"people": 2})
    [check] = done.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
