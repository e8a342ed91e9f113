"""A table of an app in the lake read back whole: what was loaded, and on top what its log holds beyond that."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from deltaworks.change import DELETE
from deltaworks.config import Config
from deltaworks.log.registry import open_reader as open_log
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import StoredVersion, key_text
from deltaworks.schema import TableSchema
from deltaworks.store.lake import Lake, quoted
from deltaworks.store.load import NOTHING_LOADED, last_load

_PAGE = 50_000
NO_ORDINAL = 0xFFFFFFFF
"""The lake keeps the position of a row's newest change and no ordinal; the largest one stands for it."""


class LakeBackReader:
    """A `SinkReader` of one table; a lake that is not there yet is empty. Serves one thread.

    Holds in memory what the log has beyond the newest load.
    """

    def __init__(self, schema: TableSchema, *, app: str, config: Config) -> None:
        self._schema = schema
        self._app = app
        self._lake = _opened(config)
        loaded = NOTHING_LOADED if self._lake is None else last_load(self._lake, app)
        self._newer: dict[str, tuple[Version, Mapping[str, Any] | None]] = {}
        for group in open_log(config, app).read(after_sequence=loaded.sequence):
            for batch in group.batches:
                if batch.schema.name == schema.name:
                    self._lay_on_top(batch.rows.to_pylist())

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        key = quoted(*self._schema.key)
        for value, commit in self._rows(f"{key}, _commit"):
            text, version = key_text(value), Version(Lsn(commit), NO_ORDINAL)
            newer = self._newer.get(text)
            # What the log has beyond is loaded only where it is newer.
            if newer is None or newer[0].position < version.position:
                self._newer.pop(text, None)
                yield StoredVersion(key=text, version=version)
        for text, (version, body) in self._newer.items():
            yield StoredVersion(key=text, version=version, is_deleted=body is None)

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        wanted = list(keys)
        names = self._schema.names
        columns = ", ".join(quoted(name) for name in names)
        where = f"cast({quoted(*self._schema.key)} as varchar) in (select unnest(?))"
        place = names.index(self._schema.key[0])
        found: dict[str, Mapping[str, Any]] = {}
        for *row, commit in self._rows(f"{columns}, _commit", where=where, parameters=[wanted]):
            newer = self._newer.get(key_text(row[place]))
            if newer is None or newer[0].position.value < commit:
                found[key_text(row[place])] = dict(zip(names, row, strict=True))
        for text in wanted:
            _, body = self._newer.get(text, (None, None))
            if body is not None:
                found.setdefault(text, body)
        return found

    def close(self) -> None:
        """Let go of the lake."""
        if self._lake is not None:
            self._lake.close()
            self._lake = None

    def _rows(self, columns: str, *, where: str = "true", parameters: list[Any] | None = None) -> Iterator[Any]:
        table = self._schema.name.short
        if self._lake is None or not self._lake.has(self._app, table):
            return iter(())
        rows = self._lake.connection.execute(
            f"select {columns} from {quoted('lake', self._app, table)} where {where}", parameters
        )
        return chain.from_iterable(iter(lambda: rows.fetchmany(_PAGE), []))

    def _lay_on_top(self, rows: Iterable[Mapping[str, Any]]) -> None:
        (key,) = self._schema.key
        for row in rows:
            text, version = key_text(row[key]), Version(Lsn(row["_commit"]), row["_ordinal"])
            known = self._newer.get(text)
            if known is None or known[0] <= version:
                body = None if row["_op"] == DELETE else {name: row[name] for name in self._schema.names}
                self._newer[text] = (version, body)


def _opened(config: Config) -> Lake | None:
    kind, _, place = config.lake_catalog.partition(":")
    # Nothing was loaded yet; any other reason not to open it is one that a reader has to be told.
    if kind == "sqlite" and not Path(place).exists():
        return None
    return Lake.open(
        catalog=config.lake_catalog,
        data=config.lake_data,
        s3=config.lake.s3,
        extensions=config.extension_folder,
        read_only=True,
    )
