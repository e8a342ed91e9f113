"""A statement on the bare socket: every row comes, and one that is ended early ends cleanly."""

import psycopg
import pytest
from servers.postgres import Database

from deltaworks.capture.postgres.fetch import FIRST_ASKED_ROWS, PIECE_ROWS, Fetch


def fetched(connection: psycopg.Connection, fetch: Fetch) -> list[list[bytes]]:
    """The cells of all rows, column by column, copied out of each piece while it is valid."""
    columns: list[list[bytes]] = [[] for _ in range(fetch.column_count)]
    for piece in fetch.run(connection):
        for column, cells in zip(columns, piece, strict=True):
            column += [
                bytes(cells.data[start : start + size]) for start, size in zip(cells.starts, cells.sizes, strict=True)
            ]
    return columns


def is_in_order(connection: psycopg.Connection) -> bool:
    """Whether the transaction goes on, which one that was cancelled in does not."""
    return connection.execute("select 1").fetchone() == (1,)


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, FIRST_ASKED_ROWS, 2 * FIRST_ASKED_ROWS, FIRST_ASKED_ROWS + PIECE_ROWS])
def test_every_row_comes_wherever_the_requests_end(database: Database, count: int, offset: int) -> None:
    rows = count + offset
    fetch = Fetch(b"select g from generate_series(1, $1::int) g", [str(rows)], column_count=1, most_bytes=32 << 20)
    with database.connect() as connection, connection.transaction():
        (found,) = fetched(connection, fetch)
        assert is_in_order(connection)
    assert found == [b"%d" % row for row in range(1, rows + 1)]
    assert not fetch.is_cut


@pytest.mark.parametrize("most_bytes", [1 << 20, 4 << 20])
def test_statement_with_more_rows_than_fit_ends_without_failing_its_transaction(
    database: Database, most_bytes: int
) -> None:
    statement = b"select g, repeat('x', 90) from generate_series(1, 1000000) g"
    fetch = Fetch(statement, [], column_count=2, most_bytes=most_bytes)
    with database.connect() as connection, connection.transaction():
        numbers, texts = fetched(connection, fetch)
        assert is_in_order(connection)
    assert fetch.is_cut
    assert numbers == [b"%d" % row for row in range(1, len(numbers) + 1)]
    assert most_bytes / 2 < sum(map(len, texts)) <= most_bytes


def test_rows_that_are_suddenly_large_are_cut_off(database: Database) -> None:
    statement = b"select g, repeat('x', case when g > 20000 then 1000000 else 10 end) from generate_series(1, 60000) g"
    fetch = Fetch(statement, [], column_count=2, most_bytes=4 << 20)
    with database.connect() as connection:
        connection.execute("begin")
        numbers, texts = fetched(connection, fetch)
        connection.execute("rollback")
        assert is_in_order(connection)
    assert fetch.is_cut
    assert numbers == [b"%d" % row for row in range(1, len(numbers) + 1)]
    # As many bytes again may be on their way when the statement is cancelled.
    assert sum(map(len, texts)) < 10 << 20


def test_error_in_the_middle_of_the_rows_is_the_first_that_the_server_gave(database: Database) -> None:
    statement = b"select 1 / (60000 - g) from generate_series(1, 100000) g"
    with database.connect() as connection:
        connection.execute("begin")
        # The requests behind it are answered by: current transaction is aborted.
        with pytest.raises(psycopg.errors.DivisionByZero):
            fetched(connection, Fetch(statement, [], column_count=1, most_bytes=32 << 20))
        connection.execute("rollback")
        assert is_in_order(connection)


def test_two_statements_of_one_transaction_do_not_mix(database: Database) -> None:
    with database.connect() as connection, connection.transaction():
        first = Fetch(b"select g from generate_series(1, 1000000) g", [], column_count=1, most_bytes=1 << 20)
        fetched(connection, first)
        (second,) = fetched(connection, Fetch(b"select 'second'", [], column_count=1, most_bytes=1 << 20))
    assert first.is_cut
    assert second == [b"second"]
