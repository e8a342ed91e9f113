"""Tables made, checked, shared by two writers, and what their database refuses; the database is asked."""

import threading
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import pytest
from contracts.sinks import config_with
from servers.mariadb import MariaDbDatabase
from servers.postgres import Database

from deltaworks.config import Config
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document, Refusal, SinkSpec
from deltaworks.store.sinks.mysql_table import MySqlTable
from deltaworks.store.sinks.postgres_table import PostgresTable
from deltaworks.store.sinks.sql_table import SqlTableError
from deltaworks.testing.faults import fail_at

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


class Film(TypedDict):
    film_id: int
    title: str | None


class FilmWithRating(TypedDict):
    film_id: int
    title: str | None
    rating: Decimal | None


@pytest.fixture
def config(database: Database, tmp_path: Path) -> Config:
    return config_with(tmp_path, warehouse={"kind": "postgres", "dsn": database.dsn})


def table(name: str = "film", schema: type = Film) -> PostgresTable:
    return PostgresTable(name, connection="warehouse", schema=schema)


def film(key: int, position: int, title: str | None, **more: Any) -> Document:
    body = None if title is None else {"film_id": key, "title": title, **more}
    return Document(key=key, version=Version(Lsn(position), 0), committed_at=MOMENT, body=body)


def put(spec: SinkSpec, config: Config, *documents: Document, up_to: int = 0) -> list[Refusal]:
    sink = spec.open(app="films", key="film_id", config=config)
    try:
        sink.write(documents)
        return list(sink.flush(up_to=Lsn(up_to)))
    finally:
        sink.close()


def test_readers_see_live_rows_only_with_their_versions(database: Database, config: Config) -> None:
    put(table(), config, film(1, 5, "Alien"), film(2, 5, "Brazil"))
    put(table(), config, film(2, 6, None), up_to=6)
    assert database.rows("select film_id, title, _commit, _ordinal from film") == [(1, "Alien", 5, 0)]
    assert database.rows("select sink, position from deltaworks_sink") == [("public.film", 6)]


def test_rows_and_the_position_of_a_flush_are_one_transaction(database: Database, config: Config) -> None:
    sink = table().open(app="films", key="film_id", config=config)
    sink.write([film(1, 5, "Alien")])
    with fail_at("sql_table.before_commit", RuntimeError("dies")), pytest.raises(RuntimeError):
        sink.flush(up_to=Lsn(5))
    assert database.rows("select count(*) from film") == [(0,)]
    assert database.rows("select position from deltaworks_sink") in ([], [(0,)])
    sink.flush(up_to=Lsn(5))
    sink.close()
    assert database.rows("select (select count(*) from film), position from deltaworks_sink") == [(1, 5)]


def test_a_table_made_by_hand_keeps_its_own_types_and_checks(database: Database, config: Config) -> None:
    database.execute(
        "create table film (film_id int primary key, title varchar(6) not null check (title <> 'banned'),"
        " note text default 'mine', _commit bigint, _ordinal bigint, _committed_at timestamptz)"
    )
    refusals = put(
        table(), config, film(1, 1, "Alien"), film(2, 1, "banned"), film(3, 1, "far too long"), film(1 << 40, 1, "id")
    )
    assert database.rows("select film_id, title, note from film") == [(1, "Alien", "mine")]
    reasons = {refusal.key: refusal.reason for refusal in refusals}
    assert reasons.keys() == {2, 3, 1 << 40}
    assert "constraint 'film_title_check'" in reasons[2]
    assert not [reason for reason in reasons.values() if "banned" in reason or "far too" in reason]


def test_a_declared_column_is_added(database: Database, config: Config) -> None:
    put(table(), config, film(1, 1, "Alien"))
    put(table(schema=FilmWithRating), config, film(2, 2, "Brazil", rating=Decimal("7.90")))
    assert database.rows("select film_id, rating from film order by 1") == [(1, None), (2, Decimal("7.90"))]


def test_a_table_of_something_else_is_left_alone(database: Database, config: Config) -> None:
    database.execute("create table film (film_id int primary key, title text)", "create table note (id int)")
    with pytest.raises(SqlTableError, match="lacks _commit, _committed_at, _ordinal"):
        table().open(app="films", key="film_id", config=config)
    with pytest.raises(SqlTableError, match="no key column 'film_id'"):
        table("note").open(app="films", key="film_id", config=config)
    with pytest.raises(SqlTableError, match="the app's key 'id' is not a column"):
        table().open(app="films", key="id", config=config)


def test_a_role_without_rights_and_a_broken_dsn_stop_the_app_and_tell_no_password(
    database: Database, tmp_path: Path
) -> None:
    for dsn in (
        "host=127.0.0.1 password='hunter2",
        f"{database.dsn} options='-c default_transaction_read_only=off' x=1",
    ):
        config = config_with(tmp_path, warehouse={"kind": "postgres", "dsn": dsn})
        with pytest.raises(SqlTableError, match=r"connections\.warehouse\.dsn") as raised:
            table().open(app="films", key="film_id", config=config)
        assert "hunter2" not in str(raised.value)


def test_writers_side_by_side_never_take_a_key_back(database: Database, config: Config) -> None:
    """A writer that was believed dead goes on beside its successor; the database ends at the newest of both."""
    put(table(), config)
    faults: list[Exception] = []

    def write(start: int) -> None:
        sink = table().open(app="films", key="film_id", config=config)
        try:
            for position in range(start, 60, 2):
                title = None if position % 5 == 0 else str(position)
                sink.write([film(key, position + key, title) for key in range(10)])
                sink.flush(up_to=Lsn(position))
        except Exception as error:
            faults.append(error)
        finally:
            sink.close()

    threads = [threading.Thread(target=write, args=(start,)) for start in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert database.rows("select film_id, _commit, title from film order by 1") == [
        (key, 59 + key, "59") for key in range(10)
    ]


@pytest.mark.server
def test_mysql_refuses_what_it_would_cut_or_round(mariadb_database: MariaDbDatabase, tmp_path: Path) -> None:
    config = config_with(tmp_path, legacy=mariadb_database.connection())
    spec = MySqlTable("film", connection="legacy", schema=FilmWithRating)
    refusals = put(
        spec,
        config,
        film(1, 1, "Alien", rating=Decimal("7.9000000000")),
        film(2, 1, "Brazil", rating=Decimal("0.0000000001")),
        film(3, 1, "Casablanca", rating=Decimal("1e30")),
        film(1 << 63, 1, "Dune"),
        film(5, 1, "\ud800"),
    )
    assert {refusal.key for refusal in refusals} == {2, 3, 1 << 63, 5}
    assert mariadb_database.rows("select film_id, rating from film") == [(1, Decimal("7.900000000"))]


@pytest.mark.server
def test_mysql_with_a_wrong_password_stops_the_app(mariadb_database: MariaDbDatabase, tmp_path: Path) -> None:
    config = config_with(tmp_path, legacy=mariadb_database.connection() | {"password": "hunter2"})
    with pytest.raises(SqlTableError, match="1045") as raised:
        MySqlTable("film", connection="legacy", schema=Film).open(app="films", key="film_id", config=config)
    assert "hunter2" not in str(raised.value)
