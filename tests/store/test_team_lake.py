"""A team's lake: the catalog in PostgreSQL, the data on S3; everything holds there that holds on one machine."""

import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from servers.lakes import OpenLake
from servers.object_store import SECRET_KEY, Bucket, answering, forgetting_who_was_first, new_bucket, s3_server
from servers.postgres import Database

from deltaworks.config import S3Config
from deltaworks.gate.release import current_release, release
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.recorder import drain
from deltaworks.object_store import (
    PROBE,
    ConditionalWriteError,
    ObjectStore,
    ObjectStoreDeniedError,
    ObjectStoreDownError,
)
from deltaworks.store.address import CatalogAddressError, LakeAddress
from deltaworks.store.lake import Lake, LakeUnavailableError
from deltaworks.store.load import load
from deltaworks.store.verify import verify
from deltaworks.testing.faults import fail_at
from deltaworks.testing.postgres import free_port

PASSWORD = "a-password-that-nobody-may-see"


@pytest.fixture
def catalog(database: Database) -> Iterator[str]:
    """A PostgreSQL catalog, reached with a password."""
    role = f"loader_{database.name}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create role {} login password {}").format(sql.Identifier(role), PASSWORD))
        connection.execute(
            sql.SQL("grant all on database {} to {}").format(sql.Identifier(database.name), sql.Identifier(role))
        )
        connection.execute(sql.SQL("grant all on schema public to {}").format(sql.Identifier(role)))
    parts = conninfo_to_dict(database.dsn) | {"user": role, "password": PASSWORD}
    yield "postgres:" + make_conninfo(**parts)
    with database.connect() as connection:
        connection.execute(sql.SQL("drop owned by {} cascade").format(sql.Identifier(role)))
        connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


@pytest.fixture(params=["PostgreSQL and S3", "SQLite and S3"])
def team(request: pytest.FixtureRequest, lake_settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a lake that is not wholly on this machine."""
    settings = dict(lake_settings)
    if "PostgreSQL" in request.param:
        settings["catalog"] = request.getfixturevalue("catalog")
    if "S3" in request.param:
        bucket: Bucket = request.getfixturevalue("bucket")
        settings |= {"data": bucket.address, "s3": bucket.config}
    return settings


@pytest.fixture
def open_team_lake(team: dict[str, Any]) -> OpenLake:
    return lambda **options: Lake.open(**(team | options))


def films(lake: Lake, schema: str = "shop") -> list[tuple[Any, ...]]:
    return lake.connection.execute(f"select film_id, title from lake.{schema}.film order by 1").fetchall()


def put(film_id: int, title: str = "t") -> dict[str, Any]:
    return {"_op": "c", "film_id": film_id, "title": title}


def test_loads_go_on_after_a_crash_and_repeat_nothing(open_team_lake: OpenLake, changes: Any) -> None:
    changes.commit(10, *(put(number) for number in range(100)))
    with (
        open_team_lake() as lake,
        fail_at("load.before_commit", OSError("power")),
        pytest.raises(OSError, match="power"),
    ):
        load(lake, changes.reader, log="shop")
    with open_team_lake() as lake:
        assert not lake.has("shop", "film")
        assert load(lake, changes.reader, log="shop").changes == 100
        changes.commit(20, {"_op": "d", "film_id": 0}, {"_op": "u", "film_id": 1, "title": "renamed"})
        assert load(lake, changes.reader, log="shop").changes == 2
        assert load(lake, changes.reader, log="shop").is_empty
    with open_team_lake(read_only=True) as lake:
        assert films(lake)[:2] == [(1, "renamed"), (2, "t")]
        assert len(films(lake)) == 99


def test_loads_at_once_on_nothing_load_everything_once(open_team_lake: OpenLake, changes: Any) -> None:
    for position in range(1, 7):
        changes.commit(position, put(position))

    def load_all() -> None:
        with open_team_lake() as mine:
            for sequence in range(6):
                load(mine, changes.reader, log="shop", up_to_sequence=sequence)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(load_all) for _ in range(2)]:
            done.result()
    with open_team_lake(read_only=True) as lake:
        assert films(lake) == [(number, "t") for number in range(1, 7)]


def test_a_source_equals_its_lake_and_is_released(open_team_lake: OpenLake, database: Database, tmp_path: Path) -> None:
    database.execute(
        "create schema shop",
        "create table shop.film (film_id int primary key, title text, score numeric(4, 2), seen_at timestamptz, "
        "ratio double precision, tags text[])",
        "insert into shop.film select n, 'film ' || n, n % 10 + 0.25, '2026-10-25 02:30:00.123456+00', 'NaN', "
        "array['a', null] from generate_series(1, 300) n",
    )
    source = database.source("shop.film", publication="shop")
    folder = tmp_path / "log"

    def catch_up() -> None:
        with LocalLogWriter.open(folder) as writer:
            drain(source, writer, LocalLogReader(folder))

    with closing(source), open_team_lake() as lake:
        catch_up()
        load(lake, LocalLogReader(folder), log="shop")
        database.execute(
            "update shop.film set score = 9.75 where film_id < 50", "delete from shop.film where film_id = 7"
        )
        found = verify(source, lake, LocalLogReader(folder), log="shop", catch_up=catch_up)
        assert found.is_equal
        assert [(table.table, table.source_rows) for table in found.tables] == [("shop__film", 299)]
        made = release(lake, views={"film": "shop.shop__film"}, evidence={"equal": True})
        load(lake, LocalLogReader(folder), log="shop")
    with open_team_lake(read_only=True) as reader:
        assert current_release(reader) == made
        assert reader.connection.execute("select count(*) from lake.prod.film").fetchone() == (300,)
        assert reader.row_count("shop", "shop__film") == 299


def test_data_is_on_s3_and_nowhere_else(
    lake_settings: dict[str, Any], bucket: Bucket, changes: Any, tmp_path: Path
) -> None:
    changes.commit(10, put(1))
    with Lake.open(**lake_settings | {"data": bucket.address, "s3": bucket.config}) as lake:
        load(lake, changes.reader, log="shop")
    assert not list(tmp_path.rglob("*.parquet"))
    assert all(key.startswith("lake/") for key in bucket.objects())
    assert any(key.startswith("lake/shop/film/") for key in bucket.objects())


# Promises of the store


def test_the_first_start_leaves_one_object_and_later_ones_none(bucket: Bucket) -> None:
    for _ in range(3):
        ObjectStore.at(bucket.address, bucket.config).refuse_second_writer()
        assert bucket.objects() == [f"lake/{PROBE}"]


def test_a_store_that_accepts_both_writers_is_refused_by_name(lake_settings: dict[str, Any]) -> None:
    with s3_server(forgetting_who_was_first) as endpoint:
        bucket = new_bucket(endpoint, "forgetful")
        settings = lake_settings | {"data": bucket.address, "s3": bucket.config}
        with pytest.raises(ConditionalWriteError, match=rf"{endpoint}.*two writers.*set lake\.data") as raised:
            Lake.open(**settings)
        assert_no_secret(raised.value)
        with pytest.raises(LakeUnavailableError, match="no lake at"):
            Lake.open(**settings, read_only=True)


@pytest.mark.parametrize(
    ("status", "code", "error", "told"),
    [
        ("501 Not Implemented", "NotImplemented", ConditionalWriteError, "answers 'NotImplemented' to a write"),
        ("403 Forbidden", "AccessDenied", ObjectStoreDeniedError, "'AccessDenied'; look at lake.data"),
        ("503 Slow Down", "SlowDown", ObjectStoreDownError, "answers 503 'SlowDown'; try again later"),
    ],
)
def test_what_the_store_answers_is_told_with_the_next_step(
    status: str, code: str, error: type[Exception], told: str
) -> None:
    with s3_server(answering(status, code)) as endpoint:
        bucket = new_bucket(endpoint, "answers")
        with pytest.raises(error, match=told) as raised:
            ObjectStore.at(bucket.address, bucket.config).refuse_second_writer()
    assert endpoint in str(raised.value)
    assert_no_secret(raised.value)


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:
    with pytest.raises(ObjectStoreDeniedError, match=r"s3://nobody-s/lake/.*'NoSuchBucket'"):
        ObjectStore.at("s3://nobody-s/lake", bucket.config).refuse_second_writer()


def test_a_store_that_is_down_is_named(bucket: Bucket) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    config = bucket.config.model_copy(update={"endpoint": endpoint})
    with pytest.raises(ObjectStoreDownError, match=rf"cannot reach '{endpoint}'.*is lake\.s3\.endpoint right"):
        ObjectStore.at(bucket.address, config).refuse_second_writer()


# Secrets


def assert_no_secret(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error))
    assert SECRET_KEY not in told
    assert PASSWORD not in told


def test_no_secret_is_in_an_address_a_listing_or_a_representation(catalog: str, bucket: Bucket, tmp_path: Path) -> None:
    address = LakeAddress.of(catalog=catalog, data=bucket.address, s3=bucket.config)
    assert PASSWORD in catalog
    shown = [repr(address), repr(bucket.config), address.attach(read_only=False)]
    with Lake.open(catalog=catalog, data=bucket.address, s3=bucket.config, extensions=tmp_path / "new") as lake:
        for view in ("duckdb_databases()", "duckdb_secrets()", "duckdb_settings()", "lake.options()"):
            shown.append(str(lake.connection.execute(f"select * from {view}").fetchall()))
    assert not [text for text in shown if PASSWORD in text or SECRET_KEY in text]


def test_a_catalog_that_is_down_is_told_without_its_password(lake_settings: dict[str, Any]) -> None:
    catalog = f"postgres:postgresql://loader:{PASSWORD}@127.0.0.1:{free_port()}/lake"
    with pytest.raises(LakeUnavailableError, match=r"cannot open the lake: .*see `lake` in deltaworks\.yaml") as raised:
        Lake.open(**lake_settings | {"catalog": catalog})
    assert_no_secret(raised.value)


def test_a_catalog_address_that_cannot_be_read_is_told_without_its_password(lake_settings: dict[str, Any]) -> None:
    with pytest.raises(CatalogAddressError, match="what follows 'postgres:' is no connection string") as raised:
        Lake.open(**lake_settings | {"catalog": f"postgres:host=db {PASSWORD}"})
    assert_no_secret(raised.value)


def test_without_keys_those_of_the_machine_are_used_and_their_absence_is_told(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    config = S3Config(endpoint=bucket.endpoint)
    with pytest.raises(ObjectStoreDeniedError, match=r"cannot find keys for 's3://.*AWS_ACCESS_KEY_ID"):
        ObjectStore.at(bucket.address, config).keys()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert ObjectStore.at(bucket.address, config).keys().access_key_id == "from-the-environment"
