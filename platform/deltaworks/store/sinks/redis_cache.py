"""A cache in Redis as a sink: one hash for each document, written by a script that compares versions.

    HGET film:7 body   ──► the document as JSON
    HMGET film:7 version committed_at

A deleted document stays as a hash without a body, so that a late write does not bring it back, for
`tombstone_s`. That is all a cache promises: a write later than that is taken, and ends with its own TTL. What
Redis evicts, or loses in a crash, comes again with the entity's next change or with `reprocess`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from deltaworks.config import Config
from deltaworks.connection import RedisConnection
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
from deltaworks.store.sinks.package import needed
from deltaworks.store.sinks.pending import PendingSink

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

PIPELINE = 1_000
"""Scripts sent at once; Redis serves others between them."""
_DIGITS = 20
"""Of a position and of an ordinal: 64 bits. Lua's numbers lose the last bits of such, equally long texts do not."""
_PASSING = frozenset(
    {"OOM", "READONLY", "LOADING", "BUSY", "MISCONF", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN", "CLUSTERDOWN"}
)
"""First words of answers that pass: memory, replication, start-up, a slow script."""
_PATTERN = re.compile(rb"[*?\[\]\\]")

WRITE = """
local held = redis.call('hget', KEYS[1], 'version')
if held and held > ARGV[1] then return 0 end
if ARGV[4] == '' then
  redis.call('hdel', KEYS[1], 'body')
  redis.call('hset', KEYS[1], 'version', ARGV[1], 'committed_at', ARGV[2])
else
  redis.call('hset', KEYS[1], 'version', ARGV[1], 'committed_at', ARGV[2], 'body', ARGV[4])
end
if ARGV[3] == '0' then redis.call('persist', KEYS[1]) else redis.call('pexpire', KEYS[1], ARGV[3]) end
return 1
"""
"""KEYS: the hash. ARGV: version, commit time, milliseconds to live or 0 for ever, body or nothing."""


class RedisError(TerminalError):
    """The server refuses what no other document would change: the account, its rights, or a key of another type."""


@dataclass(frozen=True, slots=True)
class RedisCache:
    """Cache entries as an app declares them; a `SinkSpec`. The entry of key 7 is the hash `NAME:7`.

    `ttl_s` is how long an entry lives after its last change, for ever when left out; `tombstone_s` how long a
    deleted one refuses late writes. `connection` is a name under `connections:` in `deltaworks.yaml`, of kind `redis`.
    Needs the extra `[redis]`.

    >>> RedisCache("film", connection="cache", ttl_s=3600).capabilities.may_forget
    True
    """

    name: str
    connection: str = field(kw_only=True)
    ttl_s: float | None = field(default=None, kw_only=True)
    tombstone_s: float = field(default=7 * 86_400.0, kw_only=True)

    def __post_init__(self) -> None:
        for option, value in (("ttl_s", self.ttl_s), ("tombstone_s", self.tombstone_s)):
            if value is not None and value < 0.001:
                raise RedisError(f"cannot declare the cache {self.name!r}: {option} is {value!r}; use 0.001 or more")

    @property
    def capabilities(self) -> Capabilities:
        """Versions are compared in the server; entries end by themselves."""
        return Capabilities(is_versioned=True, can_read_back=True, may_forget=True)

    def open(self, *, app: str, key: str, config: Config) -> Sink:  # noqa: ARG002
        """Connect.

        Raises:
            SinkAwayError: the server is not there now.
            RedisError: it refuses the account.
        """
        client = _connect(config.connection(self.connection, RedisConnection))
        try:
            with _errors(self.name):
                client.ping()
        except BaseException:
            client.close()
            raise
        return PendingSink(self.name, RedisDelivery(client, self))

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read the entries that live now."""
        return RedisReader(_connect(config.connection(self.connection, RedisConnection)), self.name)


class RedisDelivery:
    """Brings documents into the cache; a `Delivery`."""

    def __init__(self, client: "Redis", spec: RedisCache) -> None:
        self._client = client
        self._spec = spec

    def deliver(self, documents: Sequence[Document], *, up_to: Lsn) -> Sequence[Refusal]:  # noqa: ARG002
        """See `Delivery.deliver`."""
        refusals = []
        calls = []
        for document in documents:
            try:
                calls.append(self._arguments(document))
            except UnsupportedBodyError as error:
                refusals.append(Refusal(key=document.key, version=document.version, reason=str(error)))
        with _errors(self._spec.name):
            # The script is sent by its digest, and loaded again where a restart made the server forget it.
            script = self._client.register_script(WRITE)
            for some in _parts(calls):
                pipeline = self._client.pipeline(transaction=False)
                for entry, arguments in some:
                    script(keys=[entry], args=arguments, client=pipeline)
                pipeline.execute()
        return refusals

    def close(self) -> None:
        """See `Delivery.close`."""
        self._client.close()

    def _arguments(self, document: Document) -> tuple[bytes, list[Any]]:
        ttl_s = self._spec.tombstone_s if document.body is None else self._spec.ttl_s
        body = b"" if document.body is None else document_json(document.body)
        lifetime_ms = 0 if ttl_s is None else round(ttl_s * 1000)
        arguments = [_version_text(document.version), document.committed_at.isoformat(), lifetime_ms, body]
        return _entry(self._spec.name, key_text(document.key)), arguments


class RedisReader:
    """A `SinkReader` of a cache: the entries that live now. Serves one thread."""

    def __init__(self, client: "Redis", name: str) -> None:
        self._client = client
        self._name = name

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`; an entry that comes or ends meanwhile may be in it or not."""
        prefix = _entry(self._name, "")
        pattern = _PATTERN.sub(rb"\\\g<0>", prefix) + b"*"
        seen: set[bytes] = set()
        with _errors(self._name):
            for some in _parts(self._client.scan_iter(match=pattern, count=PIPELINE)):
                # A scan may show an entry twice.
                new = [entry for entry in some if entry not in seen]
                seen.update(new)
                for entry, (version, body) in zip(new, self._held(new), strict=True):
                    if version is not None:
                        key = entry.removeprefix(prefix).decode()
                        yield StoredVersion(key=key, version=_version(version), is_deleted=body is None)

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        found: dict[str, Mapping[str, Any]] = {}
        with _errors(self._name):
            for some in _parts(keys):
                for key, (_, body) in zip(some, self._held([_entry(self._name, key) for key in some]), strict=True):
                    if body is not None:
                        found[key] = json.loads(body)
        return found

    def close(self) -> None:
        """See `SinkReader.close`."""
        self._client.close()

    def _held(self, entries: Sequence[bytes]) -> list[tuple[bytes | None, bytes | None]]:
        pipeline = self._client.pipeline(transaction=False)
        for entry in entries:
            pipeline.hmget(entry, ["version", "body"])
        return [(version, body) for version, body in pipeline.execute()]


def _connect(connection: RedisConnection) -> "Redis":
    redis = needed("redis", extra="redis")
    timeout_s = connection.timeout_s
    try:
        client: Redis = redis.Redis.from_url(
            connection.url.get_secret_value(), socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
    except ValueError:
        # The error may repeat the address with its password.
        raise RedisError("cannot read a Redis address; write redis://user:password@host:port/database") from None
    return client


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn the client's errors into ours, without what they quote."""
    from redis import exceptions  # noqa: PLC0415

    refused = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    try:
        yield
    except refused as error:
        raise RedisError(
            f"cannot use cache {name!r}: {type(error).__name__}; mend the account or its rights"
        ) from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise SinkAwayError(f"no answer from cache {name!r} ({type(error).__name__}); it is tried again") from error
    except exceptions.ResponseError as error:
        kind = str(error).partition(" ")[0]
        if isinstance(error, (exceptions.OutOfMemoryError, exceptions.ReadOnlyError)) or kind in _PASSING:
            raise SinkAwayError(f"cache {name!r} cannot take writes now ({kind}); it is tried again") from error
        raise RedisError(
            f"cannot use cache {name!r}: {kind}; a key may hold another type, or a command be switched off"
        ) from error


def _parts(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, PIPELINE)):
        yield some


def _entry(name: str, key: str) -> bytes:
    return f"{name}:{key}".encode()


def _version_text(version: Version) -> str:
    return f"{version.position.value:0{_DIGITS}}{version.ordinal:0{_DIGITS}}"


def _version(text: bytes) -> Version:
    return Version(Lsn(int(text[:_DIGITS])), int(text[_DIGITS:]))
