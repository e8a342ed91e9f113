"""`deltaworks log`: what is in the logs, group by group, and never row data unless it is asked for."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from log.test_verify_log import NOON, append, batch
from typer.testing import CliRunner, Result

from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config, load
from deltaworks.log.find import NoSuchGroupError
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import Lsn

SECRET = 77_443_322


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of three groups: offsets 0-1 at 0/A, 2-3 at 0/14, 4 at 0/1E, a minute between their commits."""
    path = tmp_path / "deltaworks.yaml"
    source = {"kind": "postgres", "dsn": "none", "tables": ["movie", "person"]}
    path.write_text(yaml.safe_dump({"sources": {"studio": source, "empty": source}}))
    with LocalLogWriter.open(load(path, environment={}).log_folder("studio"), segment_bytes=1) as writer:
        append(writer, batch([SECRET], commit=10), batch([5], commit=10, name="person"))
        append(writer, batch([2, 3], commit=20, at=NOON + timedelta(minutes=1)))
        append(writer, batch([4], commit=30, at=NOON + timedelta(minutes=2)))
    return path


@pytest.fixture
def config(path: Path) -> Config:
    return load(path, environment={})


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command_line, ["log", *arguments, "--config", str(path)])


def test_every_log_is_listed_with_what_it_keeps(path: Path, config: Config) -> None:
    empty, studio = json.loads(run(path, "ls", "--json").stdout)
    assert (studio["log"], studio["kind"], studio["writer"]) == ("studio", "local", None)
    assert (studio["first_sequence"], studio["sequence"]) == (0, 2)
    assert (studio["first_offset"], studio["next_offset"], studio["position"]) == (0, 5, "0/1E")
    files = list(config.log_folder("studio").glob("*.segment"))
    assert (studio["segments"], studio["bytes"]) == (3, sum(file.stat().st_size for file in files))
    assert (empty["log"], empty["first_sequence"], empty["segments"]) == ("empty", None, 0)
    shown = run(path, "ls")
    assert shown.exit_code == 0
    assert "studio" in shown.stdout


@pytest.mark.parametrize(
    ("place", "sequence"),
    [
        ([], 2),
        (["--sequence", "0"], 0),
        (["--offset", "1"], 0),
        (["--offset", "2"], 1),
        (["--position", "0/B"], 1),
        (["--position", "0/14"], 1),
        (["--position", "0/0"], 0),
        (["--time", "2026-05-01T12:00:30"], 1),
        (["--time", "2026-05-01T12:02:00"], 2),
        (["--time", "2026-01-01"], 0),
    ],
)
def test_a_group_is_found_by_any_place_in_it(path: Path, place: list[str], sequence: int) -> None:
    shown = run(path, "inspect", "studio", *place)
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["sequence"] == sequence


def test_a_group_is_shown_without_its_rows_unless_they_are_asked_for(path: Path) -> None:
    shown = run(path, "inspect", "studio", "--sequence", "0")
    assert json.loads(shown.stdout)["tables"] == {"public.movie": 1, "public.person": 1}
    assert str(SECRET) not in shown.stdout
    assert str(SECRET) not in run(path, "tail", "studio", "--json").stdout
    with_rows = json.loads(run(path, "inspect", "studio", "--sequence", "0", "--rows").stdout)
    assert [row["id"] for row in with_rows["rows"]["public.movie"]] == [SECRET]


def test_a_place_that_the_log_does_not_have_is_told_with_what_it_has(config: Config) -> None:
    for place in ({"sequence": 3}, {"offset": 5}, {"offset": -1}, {"position": Lsn(31)}):
        with pytest.raises(NoSuchGroupError, match="keeps groups 0 to 2, offsets 0 to 4"):
            operate.find_group(config, "studio", **place)  # type: ignore[arg-type]
    with pytest.raises(NoSuchGroupError, match="keeps groups"):
        operate.find_group(config, "studio", moment=datetime(2040, 1, 1, tzinfo=UTC))
    with pytest.raises(NoSuchGroupError, match="the log is empty"):
        operate.find_group(config, "empty")


def test_two_places_at_once_are_refused(path: Path) -> None:
    assert run(path, "inspect", "studio", "--sequence", "0", "--offset", "0").exit_code == 2


def test_the_newest_groups_come_in_their_order(path: Path) -> None:
    lines = run(path, "tail", "studio", "-n", "2").stdout.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "group 1 offset 2 at 0/14: public.movie 2",
        "group 2 offset 4 at 0/1E: public.movie 1",
    ]


def test_following_shows_groups_as_they_come(config: Config) -> None:
    stop = threading.Event()
    headers = operate.newest_groups(config, "studio", count=1, follow=stop)
    assert next(headers).sequence == 2
    with ThreadPoolExecutor(1) as pool, LocalLogWriter.open(config.log_folder("studio")) as writer:
        waiting = pool.submit(lambda: [next(headers).sequence, next(headers).sequence])
        append(writer, batch([6], commit=40))
        append(writer, batch([7], commit=50))
        assert waiting.result(timeout=30) == [3, 4]
        stop.set()
        assert list(headers) == []


def test_a_log_is_verified(path: Path, config: Config) -> None:
    whole = run(path, "verify", "studio")
    assert (whole.exit_code, whole.stdout.splitlines()[-1]) == (0, "log = reader")
    with LocalLogWriter.open(config.log_folder("studio")) as writer:
        append(writer, batch([1, 2], commit=40), written=(batch([1, 3], commit=40),))
    broken = run(path, "verify", "studio")
    assert broken.exit_code == 1
    assert "group 3, public.movie" in broken.stdout
    assert broken.stdout.splitlines()[-1] == "log ≠ reader"


def test_a_log_without_its_oldest_groups_is_verified_from_where_it_begins(path: Path, config: Config) -> None:
    min(config.log_folder("studio").glob("*.segment")).unlink()
    report = operate.verify_log(config, "studio")
    assert report.is_whole
    assert (report.groups, report.changes) == (2, 3)
    [_, studio] = operate.list_logs(config)
    assert studio.oldest is not None
    assert (studio.oldest.sequence, studio.oldest.offset) == (1, 2)
