"""What a table looks like is asked for once, and again after anything that it is made of changed."""

import pytest
from servers.postgres import Database

from deltaworks.capture.postgres import catalog
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.schema import TableName

CHANGES = (
    "alter table t add column w int",
    "alter table t rename column v to renamed",
    "alter table t alter column w type bigint",
    "alter table t drop column w",
    "alter table t replica identity full",
    "alter type mood rename to temper",
    "alter table t drop constraint t_pkey",
    "alter table t add primary key (b, a)",
    "drop table t; create table t (a int, b int, primary key (a, b))",
)


def read(source: PostgresSource) -> catalog.TableSchema:
    return source.chunk(TableName("public", "t"), after_key=None, up_to_key=("9", "9"), limit=9).schema


def test_chunks_have_the_shape_of_now_and_ask_for_it_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    describe = catalog.describe_tables
    monkeypatch.setattr(catalog, "describe_tables", lambda *some: asked.append(some) or describe(*some))
    database.execute(
        "create type mood as enum ('a')", "create table t (a int, b int, v text, m mood, primary key (a, b))"
    )
    with database.source("t") as source:
        for number, change in enumerate(("select 1", *CHANGES)):
            for statement in change.split("; "):
                database.execute(statement)
            if "drop constraint" in change:
                assert source.last_key(TableName("public", "t")) == ()
            else:
                assert read(source) == read(source) == source.tables()[0]
            # The last of `tables` is one of them.
            assert len(asked) == number + 1
