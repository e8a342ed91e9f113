"""Where a lake is: its catalog, its data, and what DuckDB needs to open both.

    catalog   sqlite:/srv/lake/catalog.sqlite      data   /srv/lake/data
              postgres:dbname=lake host=db                s3://bucket/prefix

Passwords and keys are taken out of the addresses into secrets: DuckDB repeats an address in its errors and shows
it in `duckdb_databases()`, and a secret it does not.
"""

from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from deltaworks.config import Config, S3Config
from deltaworks.errors import TerminalError
from deltaworks.object_store import ObjectStore
from deltaworks.store.secret import Secret, data_secret

_SQLITE, _POSTGRES, _S3 = "sqlite:", "postgres:", "s3://"

CATALOG_SECRET = "lake_catalog"  # noqa: S105  its name, which is no secret
"""The secret that a server's catalog is attached with; `profiles.yml` names it too."""


class CatalogAddressError(TerminalError):
    """The address of a lake's catalog cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeAddress:
    """A lake's place. `catalog` is what follows `ducklake:` in ATTACH and holds no password."""

    catalog: str
    data: str
    login: Secret | None = None
    store: ObjectStore | None = None

    @classmethod
    def of(cls, *, catalog: str, data: str, s3: S3Config) -> "LakeAddress":
        """Read the settings of a lake.

        Raises:
            CatalogAddressError: what follows `postgres:` is no connection string.
        """
        place, login = _parted(catalog)
        store = ObjectStore.at(data, s3) if data.startswith(_S3) else None
        return cls(catalog=place, data=data, login=login, store=store)

    @classmethod
    def from_config(cls, config: Config) -> "LakeAddress":
        """The address of a configuration's lake; see `of`."""
        return cls.of(catalog=config.lake_catalog, data=config.lake_data, s3=config.lake.s3)

    @property
    def catalog_file(self) -> Path | None:
        """The file of an SQLite catalog; `None` for one that a server keeps."""
        return Path(self.catalog.removeprefix(_SQLITE)) if self.catalog.startswith(_SQLITE) else None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Local folders that a writer needs."""
        data = () if self.store is not None else (Path(self.data),)
        return data if self.catalog_file is None else (self.catalog_file.parent, *data)

    @property
    def extensions(self) -> tuple[str, ...]:
        """DuckDB's extensions that it takes."""
        server = () if self.login is None else ("postgres",)
        # dbt's profile sets an option of SQLite's whatever the catalog is, so that is always there.
        return ("ducklake", "sqlite", *server, *(() if self.store is None else ("httpfs",)))

    def secrets(self) -> tuple[Secret, ...]:
        """What a connection has to know before it attaches the lake.

        Raises:
            ObjectStoreDeniedError: the data is on S3 and there are no keys.
        """
        keys = None if self.store is None else data_secret(self.store)
        return tuple(secret for secret in (self.login, keys) if secret is not None)

    def attach(self, *, read_only: bool) -> str:
        """The statement that attaches it as `lake`."""
        options = [f"data_path {literal(self.data)}", "data_inlining_row_limit 0"]
        if self.catalog_file is not None:
            # Write-ahead mode lets readers go on while a load commits, and stays set in the file. The
            # default mode makes every reader of the catalog a lock against the writer's commit.
            options += ["meta_busy_timeout 5000", *([] if read_only else ["meta_journal_mode 'WAL'"])]
        if self.login is not None:
            options.append(f"meta_secret {literal(self.login.name)}")
        if read_only:
            options.append("read_only")
        return f"attach {literal('ducklake:' + self.catalog)} as lake ({', '.join(options)})"


def literal(value: str) -> str:
    """An SQL text literal, for the few statements that take no parameters.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + value.replace("'", "''") + "'"


def _parted(catalog: str) -> tuple[str, Secret | None]:
    """The catalog without a password, and a server's catalog with the secret that has it (or has nothing)."""
    if not catalog.startswith(_POSTGRES):
        return catalog, None
    try:
        parts = conninfo_to_dict(catalog.removeprefix(_POSTGRES))
    except psycopg.ProgrammingError:
        # The library's message repeats the address, password and all, so it must not be chained.
        raise CatalogAddressError(
            "cannot read lake.catalog in deltaworks.yaml: what follows 'postgres:' is no connection string; write "
            "e.g. postgres:host=db dbname=lake user=loader password=${LAKE_PASSWORD}"
        ) from None
    password = parts.pop("password", None)
    place = _POSTGRES + make_conninfo(**{name: str(value) for name, value in parts.items()})
    options = {} if password is None else {"password": str(password)}
    return place, Secret(kind="postgres", name=CATALOG_SECRET, options=options)
