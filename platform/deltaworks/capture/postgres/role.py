"""The role that can do all that capture does and nothing more, as SQL to run; see docs/how-to/security.md."""

from importlib.resources import files

from psycopg import sql
from pydantic import SecretStr

from deltaworks.capture.postgres.catalog import quoted
from deltaworks.capture.postgres.connect import parse
from deltaworks.capture.postgres.preflight import Wanted, create_publication

DEFAULT_ROLE = "deltaworks"
"""The role's name where the connection string names no user."""


def role_sql(dsn: SecretStr, wanted: Wanted, *, version: int = 0) -> str:
    """The statements for the user of this connection string; asks no server, and holds no password.

    `version` is the server's, as a number like 180000; 0 leaves out what only newer ones know.

    Raises:
        SourceNotReadyError: it is no connection string.
    """
    parts = parse(dsn, name=wanted.source)
    role, database = str(parts.get("user") or DEFAULT_ROLE), str(parts.get("dbname") or parts.get("user") or "postgres")
    names = list(dict.fromkeys(name.namespace for name in wanted.tables))
    grants = [
        sql.SQL("grant usage on schema {} to {};").format(sql.Identifier(name), sql.Identifier(role)) for name in names
    ]
    template = files(__package__).joinpath("role.sql").read_text(encoding="utf-8")
    return template.format(
        source=wanted.source,
        role=_said(sql.Identifier(role)),
        role_name=role,
        database=_said(sql.Identifier(database)),
        schemas="\n".join(_said(grant) for grant in grants),
        tables=_said(sql.SQL(", ").join(map(quoted, wanted.tables))),
        publication=_said(create_publication(wanted, version=version)),
    )


def _said(statement: sql.Composable) -> str:
    return statement.as_string(None)
