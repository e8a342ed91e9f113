"""Schema changes: what became of the captured tables, and what of it the log of the source cannot show.

A *survey* is what the source's catalog says of its tables at a position. Two surveys compared give the
schema changes between them, and for each table whether its rows must be dumped again:

| between two surveys                          | the stream shows          | so the table is                     |
|----------------------------------------------|---------------------------|-------------------------------------|
| a column added, empty                        | it, from the next change  | left alone                          |
| a column added with a default                | nothing of older rows     | dumped again                        |
| a column renamed                             | a column gone, a new one  | dumped again                        |
| a column dropped                             | it, from the next change  | left alone                          |
| a name that was there before comes back      | nothing of older rows     | dumped again                        |
| a type changed, the rows' text may differ    | nothing of older rows     | dumped again                        |
| a label of an enum renamed                   | nothing of older rows     | dumped again                        |
| its files rewritten under changed columns    | nothing                   | dumped again                        |
| a partition made in place                    | all its rows              | left alone                          |
| a partition attached                         | nothing of its rows       | dumped again                        |
| a partition detached or dropped              | nothing                   | dumped again, what is gone deleted  |
| dropped and created again                    | the new rows              | dumped again, what is gone deleted  |
| published anew, or the publication altered   | nothing of the time between | dumped again, what is gone deleted |

A rewrite alone (VACUUM FULL, CLUSTER) changes no value, and a truncate is in the stream. Where two
changes between the same surveys cannot be told apart, a table is dumped once too often.

Pure: `Source.survey` asks the source.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from deltaworks.position import Lsn
from deltaworks.schema import TableName


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSurvey:
    """A column as the catalog has it. `number` is its identity: it outlives a new name.

    `is_filled` says that older rows show a default that is written nowhere in them. `version` is
    another one after every change of the column's entry in the catalog. `labels` are those of an enum, by the
    identity of the label.
    """

    number: int
    name: str
    source_type: str
    base_type: str
    nullable: bool
    is_filled: bool
    version: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> list[Any]:  # Any: JSON values
        """The column as a JSON list, in the order of the fields."""
        kind = [self.source_type, self.base_type, self.nullable, self.is_filled, self.version]
        return [self.number, self.name, *kind, dict(self.labels)]

    @classmethod
    def from_json(cls, stored: Sequence[Any]) -> Self:
        """Read what `to_json` gave."""
        number, name, source_type, base_type, nullable, is_filled, version, labels = stored
        return cls(
            number=number,
            name=name,
            source_type=source_type,
            base_type=base_type,
            nullable=nullable,
            is_filled=is_filled,
            version=version,
            labels=labels,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSurvey:
    """A table as the catalog has it.

    `files` maps the id of every part with rows (the table itself, or its partitions) to the name of its file,
    which a rewrite changes. `attached` are the parts that had rows when they became a part, as far as is known.
    `published` changes when the table is taken out of the publication and put back; `None` while it is out.
    `formerly` are names of columns that once were. `is_away` is the last that was seen of a table which is gone.
    """

    identity: int
    published: str | None
    key: tuple[str, ...]
    row_identity: str
    columns: tuple[ColumnSurvey, ...]
    files: Mapping[int, int] = field(default_factory=dict)
    attached: frozenset[int] = frozenset()
    formerly: frozenset[str] = frozenset()
    is_away: bool = False

    @property
    def types(self) -> dict[str, str]:
        """The source's own type of every column, by name."""
        return {column.name: column.source_type for column in self.columns}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            identity=stored["identity"],
            published=stored["published"],
            key=tuple(stored["key"]),
            row_identity=stored["row_identity"],
            columns=tuple(ColumnSurvey.from_json(column) for column in stored["columns"]),
            files={int(part): file for part, file in stored["files"].items()},
            attached=frozenset(stored["attached"]),
            formerly=frozenset(stored["formerly"]),
            is_away=stored.get("is_away", False),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The table as JSON values."""
        return {
            "identity": self.identity,
            "published": self.published,
            "key": list(self.key),
            "row_identity": self.row_identity,
            "columns": [column.to_json() for column in self.columns],
            "files": {str(part): file for part, file in self.files.items()},
            "attached": sorted(self.attached),
            "formerly": sorted(self.formerly),
            "is_away": self.is_away,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The source at `position`: which server it is, what is published, and its captured tables.

    `system` names the database cluster, `timeline` its history, which forks at a failover.
    `publication` is another one when the publication was made anew or altered.
    """

    position: Lsn
    system: str
    timeline: int
    publication: str | None
    tables: Mapping[TableName, TableSurvey]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            position=Lsn(stored["position"]),
            system=stored["system"],
            timeline=stored["timeline"],
            publication=stored["publication"],
            tables={TableName.parse(name): TableSurvey.from_json(table) for name, table in stored["tables"].items()},
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The survey as JSON values, as it is stored in a group's progress."""
        return {
            "position": self.position.value,
            "system": self.system,
            "timeline": self.timeline,
            "publication": self.publication,
            "tables": {str(name): table.to_json() for name, table in self.tables.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaChange:
    """A table's shape that changed, noticed at `position`; stored in the group that reached it.

    `old` is `None` for a table that is new to the log, `new` for one that is gone. Both are columns with
    the source's own type names. `needs_dump` says why the rows are read again, `None` where the stream has
    it all. With `may_lose_rows` rows may have gone without a change; `is_another` says that the table was made anew,
    `is_rekeyed` that rows are known by other columns now.
    """

    table: TableName
    position: Lsn
    what: tuple[str, ...]
    old: Mapping[str, str] | None
    new: Mapping[str, str] | None
    needs_dump: str | None = None
    may_lose_rows: bool = False
    is_another: bool = False
    is_rekeyed: bool = False

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            table=TableName.parse(stored["table"]),
            position=Lsn(stored["position"]),
            what=tuple(stored["what"]),
            old=stored["old"],
            new=stored["new"],
            needs_dump=stored["needs_dump"],
            may_lose_rows=stored["may_lose_rows"],
            is_another=stored["is_another"],
            is_rekeyed=stored["is_rekeyed"],
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The change as JSON values, as it is stored in a group's progress."""
        return {
            "table": str(self.table),
            "position": self.position.value,
            "what": list(self.what),
            "old": None if self.old is None else dict(self.old),
            "new": None if self.new is None else dict(self.new),
            "needs_dump": self.needs_dump,
            "may_lose_rows": self.may_lose_rows,
            "is_another": self.is_another,
            "is_rekeyed": self.is_rekeyed,
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        dumped = f"; dumped again: {self.needs_dump}" if self.needs_dump else ""
        return f"{self.table}: {', '.join(self.what)}{dumped}"


def streamed_change(table: TableName, old: Mapping[str, str], new: Mapping[str, str], *, position: Lsn) -> SchemaChange:
    """The change that the stream itself shows: a row of other columns than the row before."""
    what = [f"column {name} is gone" for name in old if name not in new]
    what += [f"column {name} is new" for name in new if name not in old]
    what += [f"column {name} is {new[name]}, was {kind}" for name, kind in old.items() if new.get(name, kind) != kind]
    return SchemaChange(table=table, position=position, what=tuple(what or ["order of columns"]), old=old, new=new)


def compare(old: Survey, new: Survey) -> Iterator[SchemaChange]:
    """What happened to the tables between two surveys, one change per table that has any."""
    is_altered = old.publication != new.publication
    for name, table in new.tables.items():
        before = old.tables.get(name)
        if before is None:
            was = next((str(other) for other, known in old.tables.items() if known.identity == table.identity), None)
            said = "table is new" if was is None else f"table is new, it was named {was}"
            yield _change(name, None, table, new.position, what=[said])
            continue
        what, reasons, may_lose_rows = _compare_table(before, table)
        if is_altered and not may_lose_rows:
            what.append("the publication was altered or made anew")
            reasons.append("what the publication left out meanwhile is not known")
            may_lose_rows = True
        if what:
            yield _change(name, before, table, new.position, what=what, reasons=reasons, may_lose_rows=may_lose_rows)
    for name, table in old.tables.items():
        if name not in new.tables and not table.is_away:
            yield _change(name, table, None, new.position, what=["table was dropped or renamed"])


def carry_over(old: Survey | None, new: Survey) -> Survey:
    """The new survey with what only the old ones know: names of columns that once were, tables that are away."""
    if old is None:
        return new
    tables = {name: _with_former(old.tables.get(name), table) for name, table in new.tables.items()}
    away = {name: replace(table, is_away=True) for name, table in old.tables.items() if name not in tables}
    return replace(new, tables=tables | away)


def _compare_table(old: TableSurvey, new: TableSurvey) -> tuple[list[str], list[str], bool]:
    """What happened, why the table must be dumped again, and whether rows may be gone without a change."""
    if old.identity != new.identity:
        return ["dropped and created again"], ["it is another table of the same name"], True
    what, reasons = _compare_columns(old, new)
    if old.is_away:
        return [*what, "the table is back"], ["what happened while it had another name is not in the log"], True
    if old.key != new.key:
        what.append(f"key is ({', '.join(new.key)}), was ({', '.join(old.key)})")
    if old.row_identity != new.row_identity:
        what.append(f"replica identity is {new.row_identity!r}, was {old.row_identity!r}")
    may_lose_rows = False
    if new.files.keys() != old.files.keys():
        more_what, more_reasons, may_lose_rows = _compare_parts(old, new)
        what += more_what
        reasons += more_reasons
    if new.published is not None and old.published != new.published:
        what.append("published anew")
        reasons.append("what happened while it was not published is not in the log")
        may_lose_rows = True
    return what, reasons, may_lose_rows


def _compare_columns(old: TableSurvey, new: TableSurvey) -> tuple[list[str], list[str]]:
    what: list[str] = []
    reasons: list[str] = []
    before = {column.number: column for column in old.columns}
    after = {column.number: column for column in new.columns}
    known = old.formerly | {column.name for column in old.columns}
    for number, column in after.items():
        was = before.get(number)
        if was is None:
            what.append(f"column {column.name} is new")
            if column.is_filled:
                reasons.append(f"column {column.name} came with a default that no change carries")
            elif column.name in known:
                reasons.append(f"column {column.name} is not the one that had this name before")
        elif was.name != column.name:
            what.append(f"column {column.name} was named {was.name}")
            reasons.append(f"rows without a change have no value under the new name {column.name}")
        if was is not None and was.source_type != column.source_type:
            what.append(f"column {column.name} is {column.source_type}, was {was.source_type}")
            if not _prints_alike(was.base_type, column.base_type):
                reasons.append(f"values of column {column.name} may print differently as {column.source_type}")
        if was is not None and any(column.labels.get(id_, label) != label for id_, label in was.labels.items()):
            what.append(f"labels of column {column.name} were renamed")
            reasons.append(f"rows without a change have the old labels in column {column.name}")
        if was is not None and was.nullable != column.nullable:
            what.append(f"column {column.name} may {'' if column.nullable else 'not '}be null")
    what += [f"column {column.name} is gone" for number, column in before.items() if number not in after]
    # A rewrite leaves the columns' entries alone unless it was a change of columns that rewrote the rows.
    versions_differ = {n: c.version for n, c in before.items()} != {n: c.version for n, c in after.items()}
    is_rewritten = any(old.files.get(part, file) != file for part, file in new.files.items())
    if is_rewritten and versions_differ and not reasons:
        what = what or ["rows were rewritten"]
        reasons.append("a change of its columns rewrote its rows")
    return what, reasons


def _compare_parts(old: TableSurvey, new: TableSurvey) -> tuple[list[str], list[str], bool]:
    arrived = new.files.keys() - old.files.keys()
    attached = sorted(arrived & new.attached)
    left = sorted(old.files.keys() - new.files.keys())
    what = [f"{len(arrived)} partitions are new"] if arrived else []
    reasons: list[str] = []
    if attached:
        reasons.append(f"{len(attached)} partitions were attached with rows that no change carries")
    if left:
        what.append(f"{len(left)} partitions are gone")
        reasons.append(f"{len(left)} partitions were detached or dropped with rows that no change deletes")
    return what, reasons, bool(left)


def _prints_alike(old: str, new: str) -> bool:
    """Whether every value prints the same under both types, as far as the rows were not rewritten."""
    texts = {"text", "varchar"}
    return old == new or (old in texts and new in texts)


def _change(
    name: TableName,
    old: TableSurvey | None,
    new: TableSurvey | None,
    position: Lsn,
    *,
    what: list[str],
    reasons: list[str] | None = None,
    may_lose_rows: bool = False,
) -> SchemaChange:
    return SchemaChange(
        table=name,
        position=position,
        what=tuple(what),
        old=None if old is None else old.types,
        new=None if new is None else new.types,
        needs_dump="; ".join(reasons) if reasons else None,
        may_lose_rows=may_lose_rows,
        is_another=old is not None and new is not None and old.identity != new.identity,
        is_rekeyed=old is not None and new is not None and old.key != new.key,
    )


def _with_former(old: TableSurvey | None, new: TableSurvey) -> TableSurvey:
    if old is None or old.identity != new.identity:
        return new
    names = {column.name for column in new.columns}
    return replace(new, formerly=old.formerly | {column.name for column in old.columns if column.name not in names})
