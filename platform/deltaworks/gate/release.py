"""Releases: which version of the lake the views of schema `prod` show.

    version 41 ── 42 (checked) ── 43 (a later load) ── 44 (the release)
                   ▲
                   └── lake.prod.movie = select * from lake.studio.movie at (version => 42)

The views are pinned to the version that the checks saw, so loads that go on meanwhile change nothing
that was released. All views and the book entry are one commit: a reader's transaction sees the
whole old release or the whole new one, and a release that dies in the middle has not happened.

Versions that views are pinned to must outlive them: expiry of old versions has to leave out the
version of the current release, and of every earlier one that should stay readable.

Views name their tables through `lake`, so a client attaches the DuckLake under that name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import duckdb

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn
from deltaworks.store.lake import SYSTEM_SCHEMA, Lake, quoted
from deltaworks.store.statements import Statements

RELEASED_SCHEMA = "prod"
"""The schema whose views are the released state."""

_SQL = Statements("release.sql", package="deltaworks.gate")


class UnreleasableError(TerminalError):
    """What should be released is not in the lake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One release: the views of `prod`, the lake's version they show, and why that was allowed.

    `positions` says per log how far the released version goes. `evidence_hash` is the SHA-256 of the
    evidence as canonical JSON: two releases with one hash rest on the same findings.
    """

    id: int
    version: int
    released_at: datetime
    views: Mapping[str, str]
    positions: Mapping[str, Lsn]
    evidence_hash: str
    evidence: Mapping[str, Any] = field(repr=False)


def release(
    lake: Lake, *, views: Mapping[str, str], evidence: Mapping[str, Any], version: int | None = None
) -> Release:
    """Point the views of `prod` (view name -> `schema.table`) at one version; the newest when left out.

    Views that are not listed any more are dropped. Pass the version that was checked. The same call
    again, with version, views and evidence unchanged, returns the release that stands.

    Raises:
        UnreleasableError: a table is not in that version; the previous release stays.
        LakeBusyError: other writers came first for too long; the previous release stays.
    """
    candidate = lake.version() if version is None else version
    text, digest = _canonical(evidence)
    current = current_release(lake)
    if current is not None and (current.version, dict(current.views), current.evidence_hash) == (
        candidate,
        dict(views),
        digest,
    ):
        return current

    def publish(connection: duckdb.DuckDBPyConnection) -> Release:
        connection.execute(_SQL["create_schemas"])
        connection.execute(_SQL["create_prod"])
        connection.execute(_SQL["create_book"])
        _swap_views(connection, views, candidate)
        made = Release(
            id=_next_id(connection),
            version=candidate,
            released_at=datetime.now(UTC),
            views=dict(views),
            positions=loaded_positions(connection, candidate),
            evidence_hash=digest,
            evidence=json.loads(text),
        )
        connection.execute(_SQL["remember"], _row(made, text))
        faults.reach("release.before_commit")
        return made

    made, _ = lake.commit(
        publish,
        message="release",
        info=lambda made: {"release": made.id, "version": made.version, "evidence_hash": digest},
    )
    return made


def current_release(lake: Lake) -> Release | None:
    """The release that readers see, `None` before the first one."""
    return next(iter(releases(lake, limit=1)), None)


def releases(lake: Lake, *, limit: int = 20) -> tuple[Release, ...]:
    """The newest releases, newest first."""
    if not lake.has(SYSTEM_SCHEMA, "release"):
        return ()
    return tuple(_read(row) for row in lake.connection.execute(_SQL["newest"], [limit]).fetchall())


def loaded_positions(connection: duckdb.DuckDBPyConnection, version: int) -> dict[str, Lsn]:
    """How far each log was loaded in a version of the lake."""
    try:
        rows = connection.execute(_SQL["positions"].format(version=int(version))).fetchall()
    except duckdb.CatalogException:
        # Nothing had been loaded by `load` in that version.
        return {}
    return {log: Lsn(position) for log, position in rows}


def _swap_views(connection: duckdb.DuckDBPyConnection, views: Mapping[str, str], version: int) -> None:
    present = {name for (name,) in connection.execute(_SQL["present_views"]).fetchall()}
    for name in sorted(present - set(views)):
        connection.execute(f"drop view {quoted('lake', RELEASED_SCHEMA, name)}")
    for name, table in views.items():
        view = quoted("lake", RELEASED_SCHEMA, name)
        pinned = f"{quoted('lake', *table.split('.', 1))} at (version => {int(version)})"
        try:
            connection.execute(f"create or replace view {view} as select * from {pinned}")
        except (duckdb.CatalogException, duckdb.BinderException, duckdb.InvalidInputException) as error:
            raise UnreleasableError(_not_there(connection, name, table, version)) from error


def _not_there(connection: duckdb.DuckDBPyConnection, view: str, table: str, version: int) -> str:
    known = ", ".join(name for (name,) in connection.execute(_SQL["tables"]).fetchall())
    return (
        f"cannot release view {view!r}: version {version} of the lake has no table {table!r}; "
        f"now there are {known or 'none'}; load it first or take the view out"
    )


def _next_id(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute(_SQL["newest"], [1]).fetchone()
    return int(row[0]) + 1 if row is not None else 1


def _canonical(evidence: Mapping[str, Any]) -> tuple[str, str]:
    try:
        text = json.dumps(evidence, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UnreleasableError(f"cannot keep the evidence: {error}; it may hold JSON values only") from error
    return text, hashlib.sha256(text.encode()).hexdigest()


def _row(made: Release, evidence: str) -> list[Any]:
    positions = {log: position.value for log, position in made.positions.items()}
    return [
        made.id,
        made.version,
        made.released_at,
        json.dumps(dict(made.views)),
        json.dumps(positions),
        evidence,
        made.evidence_hash,
    ]


def _read(row: tuple[Any, ...]) -> Release:
    number, version, released_at, views, positions, evidence, evidence_hash = row
    return Release(
        id=number,
        version=version,
        released_at=released_at,
        views=json.loads(views),
        positions={log: Lsn(value) for log, value in json.loads(positions).items()},
        evidence_hash=evidence_hash,
        evidence=json.loads(evidence),
    )
