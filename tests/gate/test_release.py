"""Releases are one atomic step that keeps what was checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deltaworks.gate.release import UnreleasableError, current_release, release, releases
from deltaworks.log.change_log import Group
from deltaworks.log.memory import MemoryLog
from deltaworks.position import Lsn
from deltaworks.store.lake import Lake
from deltaworks.store.load import load
from deltaworks.testing.faults import fail_at

READER = """
import sys
from pathlib import Path
from deltaworks.store.lake import Lake

catalog, data, extensions = sys.argv[1:]
with Lake.open(catalog=catalog, data=data, extensions=Path(extensions), read_only=True) as lake:
    print("ready", flush=True)
    seen = set()
    while True:
        lake.connection.execute("begin")
        pair = tuple(
            lake.connection.execute(f"select max(n) from lake.prod.{view}").fetchone()[0] for view in ("one", "two")
        )
        lake.connection.execute("commit")
        assert pair[0] == pair[1], f"a mix of releases: {pair}"
        seen.add(pair[0])
        if pair[0] == 5:
            break
    print(len(seen), flush=True)
"""


def put(lake: Lake, n: int) -> int:
    """Both tables get one more row in one commit; returns the version."""

    def work(connection):
        for table in ("one", "two"):
            connection.execute(
                f"create schema if not exists lake.studio; create table if not exists lake.studio.{table} (n int)"
            )
            connection.execute(f"insert into lake.studio.{table} values (?)", [n])

    return lake.commit(work, message="put", info=lambda _: {})[1]


def newest(lake: Lake, view: str) -> int:
    return lake.connection.execute(f"select max(n) from lake.prod.{view}").fetchone()[0]


BOTH = {"one": "studio.one", "two": "studio.two"}


def test_views_show_the_version_that_was_checked(lake):
    checked = put(lake, 1)
    put(lake, 2)
    made = release(lake, views=BOTH, evidence={"checks": 3}, version=checked)
    put(lake, 3)
    assert newest(lake, "one") == 1
    assert made == current_release(lake)
    assert (made.id, made.version, made.evidence) == (1, checked, {"checks": 3})


def test_without_a_version_the_newest_one_is_released(lake):
    put(lake, 1)
    version = put(lake, 2)
    assert release(lake, views=BOTH, evidence={}).version == version
    assert newest(lake, "two") == 2


def test_a_view_that_is_no_longer_listed_is_gone(lake):
    put(lake, 1)
    release(lake, views=BOTH, evidence={})
    release(lake, views={"one": "studio.one"}, evidence={})
    assert not lake.has("prod", "two")
    assert lake.has("prod", "one")


def test_the_same_release_again_changes_nothing(lake):
    version = put(lake, 1)
    first = release(lake, views=BOTH, evidence={"a": 1}, version=version)
    before = lake.version()
    assert release(lake, views=BOTH, evidence={"a": 1}, version=version) == first
    assert lake.version() == before
    assert release(lake, views=BOTH, evidence={"a": 2}, version=version).id == 2


def test_releases_are_listed_newest_first(lake):
    put(lake, 1)
    made = [release(lake, views=BOTH, evidence={"n": n}) for n in range(3)]
    assert releases(lake, limit=2) == (made[2], made[1])


def test_positions_are_those_of_the_released_version(lake):
    log = MemoryLog()
    with log.writer() as writer:
        writer.append(Group(batches=(), position=Lsn(7)))
        put(lake, 1)
        checked = load(lake, log.reader(), log="studio").version
        writer.append(Group(batches=(), position=Lsn(9), previous_position=Lsn(7)))
        load(lake, log.reader(), log="studio")
    assert release(lake, views=BOTH, evidence={}, version=checked).positions == {"studio": Lsn(7)}


def test_a_release_that_fails_in_the_middle_keeps_the_previous_one(lake):
    put(lake, 1)
    first = release(lake, views=BOTH, evidence={})
    put(lake, 2)
    with fail_at("release.before_commit", OSError("power")), pytest.raises(OSError, match="power"):
        release(lake, views={"one": "studio.two"}, evidence={})
    assert current_release(lake) == first
    assert (newest(lake, "one"), newest(lake, "two")) == (1, 1)


def test_a_missing_table_is_named_with_those_there_are(lake):
    put(lake, 1)
    first = release(lake, views=BOTH, evidence={})
    with pytest.raises(UnreleasableError, match=r"no table 'studio.three'; now there are studio.one, studio.two"):
        release(lake, views={"one": "studio.one", "three": "studio.three"}, evidence={})
    assert current_release(lake) == first


def test_evidence_that_is_not_json_is_refused(lake):
    put(lake, 1)
    with pytest.raises(UnreleasableError, match="JSON values only"):
        release(lake, views=BOTH, evidence={"path": Path("x")})


def test_before_the_first_release_there_is_none(lake):
    assert current_release(lake) is None
    assert releases(lake) == ()


def test_a_reader_in_another_process_never_sees_a_mix(lake, lake_settings):
    put(lake, 0)
    release(lake, views=BOTH, evidence={"n": 0})
    arguments = [lake_settings["catalog"], lake_settings["data"], str(lake_settings["extensions"])]
    with subprocess.Popen([sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        for n in range(1, 6):
            put(lake, n)
            release(lake, views=BOTH, evidence={"n": n})
        seen, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert int(seen) >= 1


def test_the_commit_says_which_release_it_is(lake):
    put(lake, 1)
    made = release(lake, views=BOTH, evidence={})
    message, info = lake.connection.execute(
        "select commit_message, commit_extra_info from lake.snapshots() order by snapshot_id desc limit 1"
    ).fetchone()
    assert (message, json.loads(info)["release"]) == ("release", made.id)
