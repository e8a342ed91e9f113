"""Dumps on demand as people ask for them: from the command line and from Dagster, with a service and without."""

import subprocess
import sys

import dagster as dg
import pytest
from flows.chain import ROOT, Studio, wait

from assets import names
from assets.dumps import dumped_tables
from deltaworks import operate
from deltaworks.change import DELETE, READ
from deltaworks.log.dump_requests import Ending, Wanted
from deltaworks.log.local import LocalLogReader
from resources.deltaworks_config import DeltaworksConfig


def deltaworks(studio: Studio, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltaworks.cli", *command, "--config", str(studio.config_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
    )


def counted(studio: Studio, op: str, table: str) -> int:
    return sum(
        batch.rows.column("_op").to_pylist().count(op)
        for group in LocalLogReader(studio.config.log_folder("studio")).read(after_sequence=-1)
        for batch in group.batches
        if batch.schema.name.name == table
    )


def test_command_dumps_by_itself_when_no_service_runs(studio: Studio) -> None:
    operate.capture(studio.config, "studio")
    ((films,),) = studio.database.rows("select count(*) from movie")
    ((rated,),) = studio.database.rows("select count(*) from movie where movie_id % 3 = 0")
    done = deltaworks(studio, "dump", "studio", "movie", "--where", "movie_id % 3 = 0")
    assert done.returncode == 0, done.stderr
    assert f"{rated:,} rows of 1 tables, by this run" in done.stdout.replace("\n", " ")
    assert counted(studio, READ, "movie") == films + rated


def test_keys_that_are_gone_are_told_and_deleted_downstream(studio: Studio) -> None:
    operate.capture(studio.config, "studio")
    ((key,),) = studio.database.rows("select min(movie_id) from movie")
    done = deltaworks(studio, "dump", "studio", "movie", "--keys", f"{key},-7", "--keys", "-8")
    assert done.returncode == 1, "some keys are not there"
    assert "not found: -7" in done.stdout
    assert "not found: -8" in done.stdout
    assert counted(studio, DELETE, "movie") == 2
    operate.load(studio.config, "studio")
    assert operate.verify(studio.config, "studio").is_equal


def test_service_killed_in_the_middle_goes_on_and_the_command_waits_for_it(studio: Studio) -> None:
    operate.capture(studio.config, "studio")
    reader = LocalLogReader(studio.config.log_folder("studio"))
    before = reader.end().offset
    ((credited,),) = studio.database.rows("select count(*) from credit")
    service = studio.deltaworks("capture", "studio")
    command = studio.deltaworks("dump", "studio", "credit")
    wait(lambda: reader.end().offset > before + 500, what="the dump's first chunks")
    service.kill()
    service.wait()
    studio.database.execute("update credit set billing = billing + 1 where credit_id % 5 = 0")
    # The command finds the log free and goes on by itself, or a new service does.
    studio.deltaworks("capture", "studio")
    assert command.wait(60) == 0
    (ended,) = [each for each in operate.dumps(studio.config, "studio") if each.outcome is not None]
    assert ended.outcome is not None
    assert ended.outcome.ending is Ending.DONE
    assert ended.outcome.rows["public.credit"] <= credited
    operate.capture(studio.config, "studio")
    operate.load(studio.config, "studio")
    assert operate.verify(studio.config, "studio").is_equal


def test_status_shows_what_waits_and_what_ended_and_why(studio: Studio) -> None:
    operate.capture(studio.config, "studio")
    waiting = operate.ask(studio.config, "studio", ["movie"])
    operate.want(studio.config, "studio", waiting, Wanted.PAUSE)
    with pytest.raises(operate.DumpFailedError, match=r"does not exist"):
        operate.dump(studio.config, "studio", ["movie"], where="nonsense > 3")
    shown = deltaworks(studio, "dump", "studio", "--status").stdout
    assert waiting in shown
    assert "paused" in shown
    assert "failed" in shown
    assert deltaworks(studio, "dump", "studio", "--cancel", waiting).returncode == 0
    operate.capture(studio.config, "studio")
    assert [each.state for each in operate.dumps(studio.config, "studio")] == ["failed", "cancelled"]
    refused = deltaworks(studio, "dump", "studio", "--resume", waiting)
    assert (refused.returncode, "not under way" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("--keys", "1"), "give one table"),
        (("movie", "person", "--keys", "1"), "exactly one table"),
        (("movie", "person", "--where", "true"), "exactly one table"),
        (("movie_genre", "--keys", "1"), "has 2"),
        (("nope", "--keys", "1"), "no captured table 'nope'"),
    ],
)
def test_request_that_does_not_fit_is_refused_before_it_is_placed(
    studio: Studio, command: tuple[str, ...], said: str
) -> None:
    done = deltaworks(studio, "dump", "studio", *command)
    assert done.returncode != 0
    assert said in done.stderr.replace("\n", " ")
    assert list(operate.dumps(studio.config, "studio")) == []


def test_run_of_a_partition_dumps_its_table(studio: Studio) -> None:
    operate.capture(studio.config, "studio")
    asset = dumped_tables("studio", studio.config.sources["studio"])
    resources = {"deltaworks": DeltaworksConfig(path=str(studio.config_path))}
    result = dg.materialize([asset], partition_key="person", resources=resources)
    assert result.success
    ((people,),) = studio.database.rows("select count(*) from person")
    metadata = result.asset_materializations_for_node(asset.node_def.name)[0].metadata
    assert metadata["dagster/partition_row_count"].value == people
    assert counted(studio, READ, "person") == 2 * people
    assert asset.key == names.dumped("studio")
