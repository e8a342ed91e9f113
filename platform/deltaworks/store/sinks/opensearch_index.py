"""An index of OpenSearch, or of what speaks its API, as a sink.

    bulk with the position as external version ──► 201 taken
                       │ 409: not newer by position     │ 429: again after a while    │ 400: refused
                       ▼
    read the stored (position, ordinal) ──► older than ours or the same: write if nobody wrote meanwhile
                                        └─► newer: ours is stale

The external version settles nearly every write in one round trip, and refuses a stale one in the server, however
late it arrives. It has 63 bits, which hold a position but no ordinal beside it; so what the version cannot tell
apart, changes of one transaction and documents made anew, is compared by the fields in the document and
written under its sequence number. A deleted document stays as a tombstone: the server forgets real deletions
after a minute (`index.gc_deletes`). The alias hides tombstones from searches.
"""

import json
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaworks.config import Config
from deltaworks.connection import OpenSearchConnection
from deltaworks.errors import TerminalError
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError, document_json
from deltaworks.process.sink import (
    Capabilities,
    Document,
    Refusal,
    Sink,
    SinkAwayError,
    SinkReader,
    StoredVersion,
    key_text,
)
from deltaworks.process.step import retry_after_s
from deltaworks.store.sinks.opensearch_layout import META, PAGE, Layout, mapping_of, pages
from deltaworks.store.sinks.package import needed
from deltaworks.store.sinks.pending import PendingSink

if TYPE_CHECKING:
    from opensearchpy import OpenSearch

BULK_BYTES = 5_000_000
BULK_COUNT = 2_000
_ROUNDS = 6
"""How often busy or contended documents of a flush are sent again before the sink counts as away: for 6 s or so."""
_ID_BYTES = 512
_FIELD = re.compile(r"field \[([\w.]+)\]")
_BUSY = frozenset({429, 502, 503, 504})


class OpenSearchError(TerminalError):
    """The server refuses a request that no other document would change: rights, names, a missing alias."""


@dataclass(frozen=True, slots=True)
class OpenSearchIndex:
    """An index as an app declares it; a `SinkSpec`. Readers use the alias `name`.

    `schema` is the documents' `TypedDict` or dataclass and becomes the mapping; `mappings` says otherwise for
    single fields, `settings` are those of the index, e.g. shards or analysers. `connection` is a name under
    `connections:` in `deltaworks.yaml`, of kind `opensearch`. Needs the extra `[opensearch]`.

    >>> OpenSearchIndex("movies", connection="search").capabilities.keeps_tombstones
    True
    """

    name: str
    connection: str = field(kw_only=True)
    schema: type | None = field(default=None, kw_only=True)
    mappings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def capabilities(self) -> Capabilities:
        """Versions and tombstones are in the index; a refresh shows a flush, but not in one step."""
        return Capabilities(is_versioned=True, keeps_tombstones=True, can_read_back=True)

    def open(self, *, app: str, key: str, config: Config) -> Sink:  # noqa: ARG002
        """Connect, and make the index what is declared, by a rebuild where it has to be.

        Raises:
            SinkAwayError: the server is not there now.
            OpenSearchLayoutError: the name is taken, or documents do not fit a changed mapping.
        """
        asked = Asked()
        client = connect(config.connection(self.connection, OpenSearchConnection), asked)
        try:
            with _errors(self.name):
                mapping = mapping_of(self.schema, self.mappings)
                Layout(client, self.name, mapping=mapping, settings=self.settings).prepare()
        except BaseException:
            client.close()
            raise
        return PendingSink(self.name, OpenSearchDelivery(client, self.name, asked))

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read the index that the alias stands for now."""
        client = connect(config.connection(self.connection, OpenSearchConnection), Asked())
        with _errors(self.name):
            return OpenSearchReader(client, self.name, Layout(client, self.name, mapping={}, settings={}).index())


class OpenSearchDelivery:
    """Brings documents into the index; a `Delivery`."""

    def __init__(self, client: "OpenSearch", alias: str, asked: "Asked") -> None:
        self._client = client
        self._alias = alias
        self._asked = asked

    def deliver(self, documents: Sequence[Document], *, up_to: Lsn) -> Sequence[Refusal]:  # noqa: ARG002
        """See `Delivery.deliver`; durable when the bulk returns, visible with the refresh after it."""
        if not documents:
            return []
        refusals: list[Refusal] = []
        sources: dict[str, tuple[Document, bytes]] = {}
        for document in documents:
            try:
                sources[_id(document.key)] = (document, _source(document))
            except UnsupportedBodyError as error:
                refusals.append(_refusal(document, str(error)))
        with _errors(self._alias):
            self._write(sources, refusals)
            self._client.indices.refresh(index=self._alias)
        return refusals

    def close(self) -> None:
        """See `Delivery.close`."""
        self._client.close()

    def _write(self, sources: Mapping[str, tuple[Document, bytes]], refusals: list[Refusal]) -> None:
        guards = {
            id_: {"version": document.version.position.value, "version_type": "external"}
            for id_, (document, _) in sources.items()
        }
        for attempt in range(_ROUNDS):
            is_busy = False
            conflicts = []
            self._asked.clear()
            for id_, status, error in self._bulk(sources, guards):
                if status < 300:
                    del guards[id_]
                elif status == 409:
                    conflicts.append(id_)
                elif status in _BUSY or (status == 403 and error.get("type") == "cluster_block_exception"):
                    is_busy = True
                elif status == 400:
                    refusals.append(_refusal(sources[id_][0], _reason(error)))
                    del guards[id_]
                else:
                    raise OpenSearchError(
                        f"cannot write {self._alias!r}: {status} {error.get('type')}; mend the index or the rights, "
                        "then start the app again"
                    )
            guards = {id_: guard for id_, guard in guards.items() if id_ not in conflicts} | self._judged(
                {id_: sources[id_][0] for id_ in conflicts}
            )
            if not guards:
                return
            if is_busy and self._asked.after_s:
                # What was taken comes again with the rest, and is known by its version.
                break
            if is_busy:
                time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
        raise SinkAwayError(
            f"index {self._alias!r} is busy: {len(guards)} documents were not taken; they are tried again",
            after_s=self._asked.after_s,
        )

    def _bulk(
        self, sources: Mapping[str, tuple[Document, bytes]], guards: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """Send these documents; gives the id, status and error of each."""
        for chunk in _chunks({id_: sources[id_][1] for id_ in guards}):
            lines = []
            for id_ in chunk:
                lines += [json.dumps({"index": {"_id": id_, **guards[id_]}}).encode(), sources[id_][1]]
            body = b"\n".join([*lines, b""])
            answer = self._client.bulk(body=body, index=self._alias, params={"require_alias": "true"})
            for id_, item in zip(chunk, answer["items"], strict=True):
                yield id_, int(item["index"]["status"]), item["index"].get("error") or {}

    def _judged(self, documents: Mapping[str, Document]) -> dict[str, dict[str, Any]]:
        """How to write documents that are not newer by their position; those that are stale are left out."""
        guards: dict[str, dict[str, Any]] = {}
        ids = list(documents)
        for start in range(0, len(ids), PAGE):
            found = self._client.mget(index=self._alias, body={"ids": ids[start : start + PAGE]}, _source_includes=META)
            for item in found["docs"]:
                document = documents[item["_id"]]
                if not item.get("found"):
                    guards[item["_id"]] = {"version": document.version.position.value, "version_type": "external"}
                elif _version(item["_source"]) <= document.version:
                    guards[item["_id"]] = {"if_seq_no": item["_seq_no"], "if_primary_term": item["_primary_term"]}
        return guards


class OpenSearchReader:
    """A `SinkReader` of an index; one that is not there yet is empty. Serves one thread."""

    def __init__(self, client: "OpenSearch", alias: str, index: str | None) -> None:
        self._client = client
        self._alias = alias
        self._index = index

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`; as of the call."""
        if self._index is None:
            return
        with _errors(self._alias):
            for page in pages(self._client, self._index, source=META):
                for hit in page:
                    yield StoredVersion(
                        key=_key(hit["_id"]),
                        version=_version(hit["_source"]),
                        is_deleted=hit["_source"][META]["is_deleted"],
                    )

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        bodies: dict[str, Mapping[str, Any]] = {}
        ids = [_id(key) for key in keys] if self._index is not None else []
        for start in range(0, len(ids), PAGE):
            with _errors(self._alias):
                found = self._client.mget(index=self._index, body={"ids": ids[start : start + PAGE]})
            for item in found["docs"]:
                source = item.get("_source")
                if source is not None and not source.pop(META)["is_deleted"]:
                    bodies[_key(item["_id"])] = source
        return bodies

    def close(self) -> None:
        """See `SinkReader.close`."""
        self._client.close()


@dataclass(slots=True)
class Asked:
    """What the server asked for in `Retry-After` at its newest answers; the client shows no headers."""

    after_s: float | None = None

    def clear(self) -> None:
        """Forget it."""
        self.after_s = None

    def note(self, headers: Mapping[str, str]) -> None:
        """Take it from an answer that has it."""
        if (asked_s := retry_after_s(headers.get("retry-after"))) is not None:
            self.after_s = asked_s


def connect(connection: OpenSearchConnection, asked: Asked) -> "OpenSearch":
    """A client that tries nothing again by itself, and notes what the server asks."""
    opensearchpy = needed("opensearchpy", extra="opensearch")

    class NotingConnection(opensearchpy.Urllib3HttpConnection):  # type: ignore[misc, name-defined]  # imported late
        def _raise_error(self, status: int, *details: Any) -> None:  # Any: the client's own arguments
            try:
                super()._raise_error(status, *details)
            except opensearchpy.TransportError as error:
                error.after_s = asked.after_s
                raise

        def _create_urllib3_pool(self) -> None:
            super()._create_urllib3_pool()
            urlopen = self.pool.urlopen

            def noting(*request: Any, **options: Any) -> Any:  # Any: the client's own arguments
                answer = urlopen(*request, **options)
                asked.note(answer.headers)
                return answer

            self.pool.urlopen = noting

    password = connection.password
    client: OpenSearch = opensearchpy.OpenSearch(
        hosts=list(connection.hosts),
        http_auth=None if password is None else (connection.user, password.get_secret_value()),
        ca_certs=None if connection.ca is None else str(connection.ca),
        timeout=connection.timeout_s,
        # Trying again is decided in one place, which knows what was taken.
        max_retries=0,
        http_compress=True,
        connection_class=NotingConnection,
    )
    return client


@contextmanager
def _errors(alias: str) -> Iterator[None]:
    """Turn the client's errors into ours; a server's answer may quote a document, so only its kind is told."""
    from opensearchpy.exceptions import ConnectionError as AwayError  # noqa: PLC0415
    from opensearchpy.exceptions import TransportError  # noqa: PLC0415

    try:
        yield
    except AwayError as error:
        raise SinkAwayError(f"no answer from index {alias!r} ({type(error).__name__}); it is tried again") from error
    except TransportError as error:
        if error.status_code in _BUSY:
            raise SinkAwayError(
                f"index {alias!r} answers {error.status_code}; it is tried again",
                after_s=getattr(error, "after_s", None),
            ) from error
        raise OpenSearchError(
            f"cannot use index {alias!r}: {error.status_code} {error.error}; mend the name, the mapping or the rights"
        ) from error


def _source(document: Document) -> bytes:
    if len(_id(document.key).encode()) > _ID_BYTES:
        raise UnsupportedBodyError(f"its key has more than {_ID_BYTES} bytes; choose a shorter one in the app")
    if document.body is not None and META in document.body:
        raise UnsupportedBodyError(f"it has a field {META!r}, which is ours; rename it in the app")
    meta = {
        "position": document.version.position.value,
        "ordinal": document.version.ordinal,
        "is_deleted": document.body is None,
        "committed_at": document.committed_at,
    }
    return document_json({**(document.body or {}), META: meta})


def _version(source: Mapping[str, Any]) -> Version:
    return Version(Lsn(source[META]["position"]), source[META]["ordinal"])


def _refusal(document: Document, reason: str) -> Refusal:
    return Refusal(key=document.key, version=document.version, reason=reason)


def _reason(error: Mapping[str, Any]) -> str:
    # The server's own words end in "Preview of field's value".
    field_ = _FIELD.search(str(error.get("reason", "")))
    where = f" in field {field_[1]!r}" if field_ else ""
    return f"the index refuses it: {error.get('type', 'unknown')}{where}"


def _id(key: Any) -> str:
    """A key as an id, which must not be empty.

    >>> _id("a"), _key(_id("")), len(_id(""))
    ('a', '', 1)
    """
    text = key_text(key)
    return text if text and not text.startswith("\\") else "\\" + text


def _key(id_: str) -> str:
    return id_.removeprefix("\\")


def _chunks(sources: Mapping[str, bytes]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for id_, source in sources.items():
        if chunk and (size + len(source) > BULK_BYTES or len(chunk) == BULK_COUNT):
            yield chunk
            chunk, size = [], 0
        chunk.append(id_)
        size += len(source)
    if chunk:
        yield chunk
