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
    grantee = sql.Identifier(role)
    of_patterns = dict.fromkeys(pattern.namespace for pattern in wanted.patterns)
    names = dict.fromkeys([*(name.namespace for name in wanted.tables), *of_patterns])
    grants = [sql.SQL("grant usage on schema {} to {};").format(sql.Identifier(name), grantee) for name in names]
    if wanted.tables:
        tables = sql.SQL(", ").join(map(quoted, wanted.tables))
        grants.append(sql.SQL("grant select on table {} to {};").format(tables, grantee))
    for name in of_patterns:
        # A right cannot be given by a pattern of names, so it is for the whole schema, tables to come included.
        schema = sql.Identifier(name)
        grants.append(sql.SQL("grant select on all tables in schema {} to {};").format(schema, grantee))
        grants.append(
            sql.SQL("alter default privileges in schema {} grant select on tables to {};").format(schema, grantee)
        )
    template = files(__package__).joinpath("role.sql").read_text(encoding="utf-8")
    return template.format(
        source=wanted.source,
        role=_said(sql.Identifier(role)),
        role_name=role,
        database=_said(sql.Identifier(database)),
        grants="\n".join(_said(grant) for grant in grants),
        publication=_said(create_publication(wanted, version=version)),
    )


def _said(statement: sql.Composable) -> str:
    return statement.as_string(None)
