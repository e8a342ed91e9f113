"""What tables of PostgreSQL and MySQL share: columns, versions, tombstones, and who is refused.

    begin ─► lock the sink's row ─► stored versions ─► drop what is stale ─► upsert ─► bury ─► commit

| table                  | holds                                                                        |
|------------------------|------------------------------------------------------------------------------|
| the declared one       | a row for each document, with `_commit`, `_ordinal` and `_committed_at`      |
| `deltaworks_tombstone` | the version of each deleted document, for ever                               |
| `deltaworks_sink`      | the position that the table has reached, written with the rows of a flush    |

The lock on the sink's row makes flushes follow each other, whoever sends them, so a stale write is seen as
such also when its writer was believed dead. A document that the database refuses is found by halving.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from deltaworks import faults
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError
from deltaworks.process.shape import Field, fields_of
from deltaworks.process.sink import Capabilities, Document, Refusal, SinkAwayError, key_text
from deltaworks.schema import TableName
from deltaworks.store.sinks.pending import not_stale

META = ("_commit", "_ordinal", "_committed_at")
"""The columns behind the declared ones."""
TOMBSTONE = "deltaworks_tombstone"
REACHED = "deltaworks_sink"
HALF_A_PAIR = "it holds half of a surrogate pair, which is no text; mend it in the app"
CAPABILITIES = Capabilities(is_versioned=True, keeps_tombstones=True, is_transactional=True, can_read_back=True)


class SqlTableError(TerminalError):
    """A table cannot take the documents: its columns, the account's rights or the declaration have to change."""


class RowRefusedError(Exception):
    """The database will not take some row of a statement; `reason` names no value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlTable:
    """A table as an app declares it, with its columns in their order."""

    name: TableName
    key: str
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, name: str, schema: type, *, key: str) -> "SqlTable":
        """The table for documents of this `TypedDict` or dataclass.

        Raises:
            SqlTableError: the key is not a column, or a column has a name of ours.
        """
        fields = fields_of(schema)
        names = [field.name for field in fields]
        if key not in names:
            raise SqlTableError(
                f"cannot make table {name!r}: the app's key {key!r} is not a column; its columns are {', '.join(names)}"
            )
        taken = sorted(set(names) & set(META))
        if taken:
            raise SqlTableError(f"cannot make table {name!r}: {', '.join(taken)} is ours; rename it in {schema!r}")
        return cls(name=TableName.parse(name), key=key, fields=fields)

    @property
    def text(self) -> str:
        """The name as errors give it."""
        return repr(self.name.short)

    @property
    def key_field(self) -> Field:
        """The key column."""
        return next(field for field in self.fields if field.name == self.key)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column: the declared ones, then ours."""
        return (*(field.name for field in self.fields), *META)

    def values(self, document: Document) -> dict[str, Any]:
        """The row of a document; columns that it lacks are null."""
        body = document.body or {}
        row = {field.name: body.get(field.name) for field in self.fields}
        return row | {
            self.key: document.key,
            "_commit": document.version.position.value,
            "_ordinal": document.version.ordinal,
            "_committed_at": document.committed_at,
        }


class SqlSession(Protocol):
    """One connection, in the words of one database; opened again by itself after it broke."""

    def transaction(self) -> AbstractContextManager[None]:
        """A transaction that holds the lock on the sink's row.

        Raises:
            RetryableError: the server is not there now.
            SqlTableError: it refuses what no other document would change.
        """

    def savepoint(self) -> AbstractContextManager[None]:
        """Part of a transaction that can fail alone.

        Raises:
            RowRefusedError: the statement in it has a row that the database will not take.
        """

    def versions(self, keys: Sequence[Any]) -> dict[Any, Version]:
        """The stored versions of these keys, of deleted ones too."""

    def put(self, documents: Sequence[Document]) -> None:
        """Insert or update the rows of documents, and forget their tombstones."""

    def bury(self, documents: Sequence[Document]) -> None:
        """Delete the rows of documents that are gone, and keep their versions."""

    def reach(self, position: Lsn) -> None:
        """Record the position that the table has reached; it never goes back."""

    def key_fault(self, key: Any) -> str | None:
        """Why the database could not even look for this key."""

    def close(self) -> None:
        """Close the connection; a second call does nothing."""


class SqlDelivery:
    """Brings documents into a table, one transaction for each flush; a `Delivery`."""

    def __init__(self, session: SqlSession) -> None:
        self._session = session

    def deliver(self, documents: Sequence[Document], *, up_to: Lsn) -> Sequence[Refusal]:
        """See `Delivery.deliver`."""
        refusals, sound = [], []
        for document in documents:
            fault = self._session.key_fault(document.key)
            if fault is None:
                sound.append(document)
            else:
                refusals.append(Refusal(key=document.key, version=document.version, reason=fault))
        with self._session.transaction():
            stored = self._session.versions([document.key for document in sound]) if sound else {}
            fresh = not_stale(sound, stored)
            refusals += self._put([document for document in fresh if document.body is not None])
            gone = [document for document in fresh if document.body is None]
            if gone:
                self._session.bury(gone)
            self._session.reach(up_to)
            faults.reach("sql_table.before_commit")
        return refusals

    def close(self) -> None:
        """See `Delivery.close`."""
        self._session.close()

    def _put(self, documents: Sequence[Document]) -> list[Refusal]:
        if not documents:
            return []
        try:
            with self._session.savepoint():
                self._session.put(documents)
        except RowRefusedError as error:
            if len(documents) == 1:
                return [Refusal(key=documents[0].key, version=documents[0].version, reason=error.reason)]
            half = len(documents) // 2
            return self._put(documents[:half]) + self._put(documents[half:])
        return []


def newest_of(
    rows: Iterable[tuple[Any, int, int]], buried: Iterable[tuple[str, int, int]], keys: Sequence[Any]
) -> dict[Any, Version]:
    """What is stored of these keys, by key: rows of the table, and of `deltaworks_tombstone` by the key's text."""
    by_text = {str(key): key for key in keys}
    found = {key: Version(Lsn(commit), ordinal) for key, commit, ordinal in rows}
    return found | {by_text[text]: Version(Lsn(commit), ordinal) for text, commit, ordinal in buried}


def columns_to_add(table: SqlTable, present: Collection[str], *, meta_types: str) -> list[Field]:
    """The declared columns that a table which is there does not have; any of them may be null.

    Raises:
        SqlTableError: it has no key column, or was made for something else and lacks ours.
    """
    if table.key not in present:
        raise SqlTableError(
            f"cannot use table {table.text}: it has no key column {table.key!r}; its columns are "
            f"{', '.join(sorted(present))}; add it, or choose another table"
        )
    lacking = sorted(set(META) - set(present))
    if lacking:
        raise SqlTableError(
            f"cannot use table {table.text}: it was made for something else and lacks {', '.join(lacking)}; "
            f"add them as {meta_types}, or choose another table"
        )
    return [item for item in table.fields if item.name not in present]


def away(table: SqlTable, where: str, told: str) -> SinkAwayError:
    """The error of a server that cannot be had at this moment; `told` is what it said, without any value."""
    return SinkAwayError(f"cannot write table {table.text} at {where!r}: {told}; it is tried again")


def unusable(table: SqlTable, where: str, told: str) -> SqlTableError:
    """The error of a server that will not do it, whatever the documents are."""
    return SqlTableError(
        f"cannot write table {table.text} at {where!r}: {told}; mend the table or the rights of the account"
    )


@contextmanager
def refusing(table: SqlTable, told_of: Callable[[Exception], str | None]) -> Iterator[None]:
    """Make errors that say something about a row its refusal; `told_of` gives what such an error says, else `None`.

    Raises:
        RowRefusedError: a row is refused.
    """
    try:
        yield
    except UnsupportedBodyError as error:
        raise RowRefusedError(str(error)) from error
    except UnicodeEncodeError as error:
        raise RowRefusedError(HALF_A_PAIR) from error
    except Exception as error:
        told = told_of(error)
        if told is None:
            raise
        raise RowRefusedError(f"table {table.text} refuses it: {told}") from error


def tombstone_rows(name: str, documents: Sequence[Document]) -> Iterator[tuple[str, str, int, int]]:
    """The rows of `deltaworks_tombstone` for documents that are gone: sink, key, commit, ordinal."""
    for document in documents:
        yield (name, key_text(document.key), document.version.position.value, document.version.ordinal)


def aware(value: datetime) -> datetime:
    """A time with its zone; one without is taken as UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def text_fault(text: str) -> str | None:
    """Why no database could keep this key, if so."""
    if "\0" in text:
        return "its key holds a NUL, which the database cannot keep; take it out in the app"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "its key holds half of a surrogate pair, which is no text; mend it in the app"
    return None


@contextmanager
def closing_on_error(close: Any) -> Iterator[None]:  # Any: a function without arguments and of any result
    """Close what was half opened when the block raises."""
    try:
        yield
    except BaseException:
        close()
        raise
