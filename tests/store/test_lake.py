"""A lake opens offline, says what is wrong with it, and serves several processes at once."""

import json
import subprocess
import sys
from threading import Event, Thread

import duckdb
import pytest

from deltaworks.errors import RetryableError
from deltaworks.store import lake as lake_module
from deltaworks.store.extensions import ExtensionMissingError
from deltaworks.store.lake import LakeBusyError, LakeUnavailableError, quoted

NOTHING = {"message": "test", "info": lambda _: {}}


def make_table(connection):
    connection.execute("create schema if not exists lake.s")
    connection.execute("create table if not exists lake.s.t (n int)")


def add(n):
    return lambda connection: connection.execute("insert into lake.s.t values (?)", [n])


def numbers(lake):
    return [n for (n,) in lake.connection.execute("select n from lake.s.t order by n").fetchall()]


def test_a_new_lake_is_empty_and_in_utc(lake):
    assert lake.version() == 0
    assert lake.connection.execute("select current_setting('TimeZone')").fetchone() == ("UTC",)


def test_a_commit_returns_the_result_and_the_version_and_leaves_a_note(lake):
    result = lake.commit(lambda c: make_table(c) or 7, message="first", info=lambda n: {"n": n})
    assert result == (7, lake.version())
    row = lake.connection.execute(
        "select author, commit_message, commit_extra_info from lake.snapshots() order by snapshot_id desc limit 1"
    ).fetchone()
    assert row[:2] == ("deltaworks", "first")
    assert json.loads(row[2]) == {"n": 7}


def test_a_commit_that_raises_leaves_nothing(lake):
    lake.commit(make_table, **NOTHING)
    version = lake.version()

    def fail(connection):
        add(1)(connection)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lake.commit(fail, **NOTHING)
    assert (numbers(lake), lake.version()) == ([], version)
    lake.commit(add(2), **NOTHING)
    assert numbers(lake) == [2]


def test_a_misspelt_table_is_an_error_not_a_variable(lake):
    local_name = [1, 2]  # what DuckDB would read by this name otherwise
    with pytest.raises(duckdb.CatalogException):
        lake.connection.execute("select * from local_name")
    assert local_name


def test_rows_are_in_files_also_for_other_clients(lake, lake_settings):
    lake.commit(make_table, **NOTHING)
    plain = duckdb.connect(
        config={"extension_directory": str(lake_settings["extensions"]), "autoinstall_known_extensions": False}
    )
    with plain:
        plain.execute("load ducklake; load sqlite_scanner")
        plain.execute(f"attach 'ducklake:{lake_settings['catalog']}' as lake")
        plain.execute("insert into lake.s.t values (1)")
        files = plain.execute("select count(*) from ducklake_list_files('lake', 't', schema => 's')").fetchone()
    assert files == (1,)


def test_names_are_quoted(lake):
    odd = 'a "b".c; drop'
    lake.commit(lambda c: c.execute(f"create schema {quoted('lake', odd)}"), **NOTHING)
    lake.commit(lambda c: c.execute(f"create table {quoted('lake', odd, odd)} (n int)"), **NOTHING)
    assert lake.has(odd, odd)
    assert lake.row_count(odd, odd) == 0
    assert lake.row_count(odd, "gone") == 0


def test_reading_goes_on_while_another_commits(lake, open_lake):
    lake.commit(make_table, **NOTHING)
    lake.commit(add(1), **NOTHING)
    with open_lake(read_only=True) as reader:
        reader.connection.execute("begin")
        assert numbers(reader) == [1]
        lake.commit(add(2), **NOTHING)
        assert numbers(reader) == [1]
        reader.connection.execute("commit")
        assert numbers(reader) == [1, 2]
        with pytest.raises(duckdb.InvalidInputException, match="read-only"):
            reader.connection.execute("delete from lake.s.t")


WRITE = """
import sys
from pathlib import Path
from deltaworks.store.lake import Lake

catalog, data, extensions = sys.argv[1:]
with Lake.open(catalog=catalog, data=data, extensions=Path(extensions)) as lake:
    for at in range(25):
        some = f"n % 3 = {at % 3} and n // 30 = {at}"
        def work(connection):
            connection.execute(f"delete from lake.s.t where {some}")
            connection.execute(f"insert into lake.s.t select n from range(1200) r(n) where {some}")
        lake.commit(work, message="rewrite", info=lambda _: {})
"""


def test_a_reader_beside_a_busy_writer_sees_each_row_once(lake, lake_settings):
    """Each commit rewrites a row in every third file, and with it a third of the catalog's entries of deleted rows."""
    lake.commit(make_table, **NOTHING)
    for file in range(30):
        lake.connection.execute("insert into lake.s.t select r * 30 + ? from range(40) x(r)", [file])
    arguments = [lake_settings["catalog"], lake_settings["data"], str(lake_settings["extensions"])]
    with subprocess.Popen([sys.executable, "-c", WRITE, *arguments]) as writer:
        seen = set()
        while writer.poll() is None:
            seen.add(lake.connection.execute("select count(*), count(distinct n) from lake.s.t").fetchone())
    assert writer.returncode == 0
    assert seen == {(1200, 1200)}


def test_a_stranger_s_commit_in_between_makes_the_work_run_again(lake, open_lake):
    lake.commit(make_table, **NOTHING)
    runs = []
    with open_lake() as stranger:

        def work(connection):
            runs.append(numbers(lake))
            if len(runs) == 1:
                # Past the queue of our own writers, as dbt would.
                stranger.connection.execute("insert into lake.s.t values (1)")
            add(2)(connection)

        lake.commit(work, **NOTHING)
    assert runs == [[], [1]]
    assert numbers(lake) == [1, 2]


def test_a_stranger_who_always_comes_first_ends_in_a_retryable_error(lake, open_lake):
    lake.commit(make_table, **NOTHING)
    with open_lake() as stranger:

        def work(connection):
            numbers(lake)
            stranger.connection.execute("insert into lake.s.t values (1)")
            add(2)(connection)

        with pytest.raises(LakeBusyError, match="came first 5 times") as caught:
            lake.commit(work, **NOTHING)
    assert isinstance(caught.value, RetryableError)
    assert 2 not in numbers(lake)


def test_a_writer_that_holds_its_turn_too_long_is_named(lake, open_lake, monkeypatch):
    monkeypatch.setattr(lake_module, "WAIT_S", 0.2)
    lake.commit(make_table, **NOTHING)
    holds, done = Event(), Event()

    def hold():
        with open_lake() as other:

            def work(connection):
                holds.set()
                done.wait(30)
                add(1)(connection)

            other.commit(work, **NOTHING)

    thread = Thread(target=hold)
    thread.start()
    try:
        assert holds.wait(30)
        with pytest.raises(LakeBusyError, match=r"another writer held '.*catalog\.sqlite\.lock'"):
            lake.commit(add(2), **NOTHING)
    finally:
        done.set()
        thread.join()
    assert numbers(lake) == [1]


OPEN = """
import sys
from pathlib import Path
from deltaworks.store.lake import Lake

catalog, data, extensions, number = sys.argv[1:]
with Lake.open(catalog=catalog, data=data, extensions=Path(extensions)) as lake:
    def work(connection):
        connection.execute("create schema if not exists lake.s")
        connection.execute("create table if not exists lake.s.t (n int)")
        connection.execute("insert into lake.s.t values (?)", [int(number)])
    lake.commit(work, message="open", info=lambda _: {})
"""


def test_several_processes_may_start_at_once_on_nothing(tmp_path, open_lake):
    """No extension is unpacked and no catalog exists when they start."""
    settings = [f"sqlite:{tmp_path}/lake/catalog.sqlite", str(tmp_path / "lake" / "data"), str(tmp_path / "new")]
    children = [
        subprocess.Popen([sys.executable, "-c", OPEN, *settings, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    errors = [child.communicate(timeout=90)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, errors
    with open_lake(read_only=True) as lake:
        assert numbers(lake) == [0, 1, 2, 3]


def test_no_lake_to_read_is_said_before_anything_is_made(tmp_path, open_lake):
    with pytest.raises(LakeUnavailableError, match=r"no lake at .* load something into it first"):
        open_lake(read_only=True)
    assert not (tmp_path / "lake").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, open_lake):
    (tmp_path / "file").touch()
    with pytest.raises(LakeUnavailableError, match=r"cannot write to folder '.*/file/data': Not a directory"):
        open_lake(data=str(tmp_path / "file" / "data"))


def test_another_data_folder_than_the_catalog_s_is_refused(tmp_path, lake, open_lake):
    with pytest.raises(LakeUnavailableError, match=r"does not match existing data path"):
        open_lake(data=str(tmp_path / "elsewhere"))


def test_a_missing_extension_says_what_to_install(tmp_path, open_lake, monkeypatch):
    # `None` in sys.modules is how Python itself marks a module that must not be found.
    monkeypatch.setitem(sys.modules, "duckdb_extension_ducklake", None)
    with pytest.raises(ExtensionMissingError, match=r"pip install duckdb-extension-ducklake==1\.5\.5"):
        open_lake(extensions=tmp_path / "new")
