"""The lakehouse: a DuckLake that is attached to an in-memory DuckDB as `lake`.

    lake.<source or app>.<table>   what `load` keeps in step with a change log
    lake.deltaworks.<table>        our own books: loads, releases, results of expectations
    lake.prod.<view>               the released state

The catalog (SQLite in a file, or PostgreSQL) says which Parquet files make up which version; a
commit is one transaction of the catalog, so readers see whole commits only. Rows are never kept
inside the catalog ("data inlining" is off): SQLite has no NaN and no exact decimals, and in
DuckLake 1.0 a table altered and filled in one transaction fails with inlined rows.

Every client of an SQLite catalog must `set global sqlite_disable_multithreaded_scans = true`, as `Lake`
does: DuckDB's parallel scan takes a catalog table's range of row numbers in one transaction and reads it in
another. When a commit falls in between, entries that it rewrote are missed, and a query shows deleted
rows again, at any version and pinned or not (seen in up to 3 % of reads beside a busy writer).

Expiry: whatever removes old versions must keep every version that a release in
`lake.deltaworks.release` is pinned to while that release should stay readable, at least the
newest one, and the newest load of each log.
"""

import fcntl
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import duckdb

from deltaworks.config import S3Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.store.address import LakeAddress
from deltaworks.store.extensions import provide

_T = TypeVar("_T")

SYSTEM_SCHEMA = "deltaworks"
"""The schema of our own books in the lake; no source or app may have this name."""

WAIT_S = 60.0
"""How long a commit waits for its turn before it gives up; a load of a million changes takes less."""

_ATTEMPTS = 5
_AUTHOR = "deltaworks"
_BUSY = ("database is locked", "transaction conflict", "could not serialize")
_CREATED_MEANWHILE = ("pg_type_typname_nsp_index", 'relation "ducklake_metadata" already exists')
"""How PostgreSQL refuses the second creator of a table, before and after the first one's commit; that one stands."""


class LakeUnavailableError(TerminalError):
    """The lake cannot be opened as it is configured."""


class LakeBusyError(RetryableError):
    """Others kept writing to the lake's catalog for too long; nothing was committed."""


def quoted(*names: str) -> str:
    """An SQL identifier, each part quoted: the only way a name gets into SQL here.

    >>> quoted("lake", "studio", 'odd"name')
    '"lake"."studio"."odd""name"'
    """
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


class Lake:
    """An open lake; a context manager. One instance serves one thread.

    `connection` is an ordinary DuckDB connection with time zone UTC and the DuckLake as `lake`.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, *, attach: str, lock: Path | None) -> None:
        self.connection = connection
        self._attach = attach
        self._lock = lock

    @classmethod
    def open(
        cls, *, catalog: str, data: str, extensions: Path, s3: S3Config | None = None, read_only: bool = False
    ) -> Self:
        """Open the lake, or create it unless `read_only`.

        `catalog` is what follows `ducklake:` in DuckDB's ATTACH, `data` a folder or an `s3://` prefix whose
        service `s3` describes, `extensions` the folder of DuckDB's extensions.

        Raises:
            LakeUnavailableError: no such lake to read, a folder that cannot be written, another data folder.
            CatalogAddressError, ObjectStoreDeniedError: the address or its keys cannot be used.
            ConditionalWriteError, ObjectStoreDownError: the object store cannot be written to, or not safely.
            ExtensionMissingError: a wheel with an extension is not installed.
            LakeBusyError: the catalog stayed locked.
        """
        address = LakeAddress.of(catalog=catalog, data=data, s3=s3 or S3Config())
        catalog_file = address.catalog_file
        if read_only and catalog_file is not None and not catalog_file.exists():
            raise LakeUnavailableError(f"no lake at {str(catalog_file)!r} yet; load something into it first")
        for folder in (extensions, *(() if read_only else address.folders)):
            _make_folder(folder)
        if address.store is not None and not read_only:
            address.store.refuse_second_writer()
        connection = duckdb.connect(
            config={
                "extension_directory": str(extensions),
                "autoinstall_known_extensions": False,
                # Without this DuckDB spills into the current folder.
                "temp_directory": str(Path(tempfile.gettempdir()) / "deltaworks_spill"),
                # A misspelt table must be an error, not a Python variable that has its name.
                "python_enable_replacements": False,
            }
        )
        lake = cls(
            connection,
            attach=address.attach(read_only=read_only),
            lock=catalog_file.with_name(catalog_file.name + ".lock") if catalog_file is not None else None,
        )
        try:
            provide(connection, address.extensions, folder=extensions)
            for secret in address.secrets():
                secret.create(connection)
            connection.execute("set timezone = 'UTC'")
            if catalog_file is not None:
                connection.execute("set global sqlite_disable_multithreaded_scans = true")
            # The first attach creates the catalog's tables; two at once would both try.
            with nullcontext() if read_only else lake._turn():
                lake._attach_again()
                if not read_only:
                    lake._forbid_inlining()
        except BaseException:
            connection.close()
            raise
        return lake

    def version(self) -> int:
        """The newest version (snapshot id); inside `commit`, the version it started from."""
        return int(self._one("select id from lake.current_snapshot()"))

    def has(self, schema: str, table: str) -> bool:
        """Whether that table or view exists now."""
        return bool(
            self._one(
                "select count(*) from (select schema_name, table_name as name from duckdb_tables()"
                " where database_name = 'lake' union all select schema_name, view_name from duckdb_views()"
                " where database_name = 'lake') where schema_name = ? and name = ?",
                [schema, table],
            )
        )

    def row_count(self, schema: str, table: str) -> int:
        """Rows of a table now; 0 for one that does not exist yet."""
        return int(self._one(f"select count(*) from {quoted('lake', schema, table)}")) if self.has(schema, table) else 0

    def commit(
        self, work: Callable[[duckdb.DuckDBPyConnection], _T], *, message: str, info: Callable[[_T], Mapping[str, Any]]
    ) -> tuple[_T, int]:
        """Run `work` in one transaction and commit it; returns its result and the new version.

        `info(result)` becomes the commit's extra information, as JSON. Writers of one catalog file take
        turns. `work` runs again when a stranger committed in between, so it must read whatever it
        depends on itself.

        Raises:
            LakeBusyError: no turn within `WAIT_S`, or strangers came first five times.
        """
        with self._turn():
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    result = self._transaction(work, message=message, info=info)
                except duckdb.Error as error:
                    if not _is_busy(error):
                        raise
                    # A commit that SQLite refused can leave the catalog connection inside its dead
                    # transaction; only a new attachment is sure to let go of it.
                    self._attach_again()
                    if attempt == _ATTEMPTS:
                        raise LakeBusyError(
                            f"cannot commit {message!r}: another writer came first {attempt} times; try again later"
                        ) from error
                    time.sleep(0.05 * 2**attempt)
                else:
                    return result, int(self._one("select id from lake.last_committed_snapshot()"))
        raise AssertionError("unreachable: the loop returns or raises")

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _transaction(
        self, work: Callable[[duckdb.DuckDBPyConnection], _T], *, message: str, info: Callable[[_T], Mapping[str, Any]]
    ) -> _T:
        connection = self.connection
        connection.execute("begin")
        try:
            result = work(connection)
            connection.execute(
                "call lake.set_commit_message(?, ?, extra_info => ?)",
                [_AUTHOR, message, json.dumps(info(result))],
            )
            connection.execute("commit")
        except BaseException:
            # A failed commit has already ended the transaction; rolling back twice is an error.
            _rollback(connection)
            raise
        return result

    def _attach_again(self) -> None:
        deadline = time.monotonic() + WAIT_S
        self.connection.execute("use memory")
        self.connection.execute("detach database if exists lake")
        while True:
            try:
                self.connection.execute(self._attach)
            except duckdb.Error as error:
                if not _is_busy(error) and not any(sign in str(error) for sign in _CREATED_MEANWHILE):
                    told = " ".join(str(error).split())
                    raise LakeUnavailableError(
                        f"cannot open the lake: {told}; see `lake` in deltaworks.yaml"
                    ) from error
                if time.monotonic() > deadline:
                    raise LakeBusyError(f"cannot open the lake: its catalog was locked for {WAIT_S:.0f} s") from error
                time.sleep(0.1)
            else:
                return

    def _forbid_inlining(self) -> None:
        # Stored in the catalog, so that it also binds other clients of this lake, such as dbt.
        option = "data_inlining_row_limit"
        if not self._one("select count(*) from lake.options() where option_name = ?", [option]):
            self.connection.execute("call lake.set_option(?, 0)", [option])

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the right to write. A catalog server takes writers at once; one that collides starts over."""
        if self._lock is None:
            yield
            return
        deadline = time.monotonic() + WAIT_S
        with self._lock.open("a") as handle:
            while True:
                try:
                    # The kernel drops the lock with the process, so a killed load blocks nobody.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise LakeBusyError(
                            f"cannot write to the lake: another writer held {str(self._lock)!r} for {WAIT_S:.0f} s"
                        ) from error
                    time.sleep(0.01)
            yield

    def _one(self, statement: str, parameters: list[Any] | None = None) -> Any:  # Any: a value of any SQL type
        row = self.connection.execute(statement, parameters).fetchone()
        return row[0] if row is not None else None


def _rollback(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("rollback")
    except duckdb.Error:
        return


def _is_busy(error: duckdb.Error) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _BUSY)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LakeUnavailableError(
            f"cannot write to folder {str(folder)!r}: {error.strerror}; mend its permissions or choose another in"
            " deltaworks.yaml"
        ) from error
