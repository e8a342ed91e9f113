"""`connections:` in `deltaworks.yaml`: the servers that sinks write to, each by a name that apps use.

A secret hides in `repr` and in every error; write it as `${NAME}` and set NAME in the environment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

UNTOLD = ("dsn", "url", "password", "secret")
"""Settings that may hold a secret; no message repeats what they were given."""


class _Connection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PostgresConnection(_Connection):
    """A PostgreSQL to write tables to."""

    kind: Literal["postgres"]
    """What speaks the server's protocol."""
    dsn: SecretStr
    """A libpq connection string or URL; the role needs CREATE on the schema, or the tables made beforehand."""


class MySqlConnection(_Connection):
    """A MySQL or MariaDB to write tables to."""

    kind: Literal["mysql"]
    """What speaks the server's protocol."""
    host: str = "127.0.0.1"
    """The server's name or address."""
    port: Annotated[int, Field(ge=1, le=65535)] = 3306
    """The TCP port."""
    user: str
    """The account; it needs CREATE, SELECT, INSERT, UPDATE and DELETE in the database."""
    password: SecretStr = SecretStr("")
    """`${NAME}`; empty for an account without one."""
    database: str
    """The database that the tables are in."""
    ca: Path | None = None
    """The authority's certificate; with it the connection is encrypted and the server's name checked."""


class OpenSearchConnection(_Connection):
    """An OpenSearch, or what speaks its API as Elasticsearch 7 and 8 do."""

    kind: Literal["opensearch"]
    """What speaks the server's protocol."""
    hosts: Annotated[tuple[Annotated[str, Field(pattern=r"^https?://[^/\s@]+$")], ...], Field(min_length=1)]
    """`https://host:port` of one node or more, without an account."""
    user: str | None = None
    """The account, given together with `password`."""
    password: SecretStr | None = None
    """`${NAME}`."""
    ca: Path | None = None
    """The authority's certificate; those of the system when left out."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """How long one request may take; then the sink counts as away."""

    @model_validator(mode="after")
    def _come_together(self) -> "OpenSearchConnection":
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password belong together; one of them is missing")
        return self


class RedisConnection(_Connection):
    """A Redis, or what speaks its protocol and runs Lua scripts."""

    kind: Literal["redis"]
    """What speaks the server's protocol."""
    url: SecretStr
    """`redis://user:password@host:port/database`, `rediss://…` for TLS, `unix://…` for a socket."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """How long one answer may take; then the sink counts as away."""


class KafkaConnection(_Connection):
    """A Kafka cluster to write topics to."""

    kind: Literal["kafka"]
    """What speaks the server's protocol."""
    servers: Annotated[str, Field(min_length=1)]
    """`host:port`, more of them with commas."""
    options: Mapping[str, SecretStr] = Field(default_factory=dict)
    """More settings of librdkafka, e.g. `security.protocol` or `sasl.password`; all are kept secret."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """How long a delivery may take; then the sink counts as away."""

    @field_validator("options", mode="before")
    @classmethod
    def _values_as_text(cls, options: Any) -> Any:  # Any: YAML is any JSON-like value
        if not isinstance(options, Mapping):
            return options
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}


class WebhookConnection(_Connection):
    """An HTTP address that takes one POST for each document."""

    kind: Literal["webhook"]
    """What speaks the receiver's protocol."""
    url: SecretStr
    """Where to post to; it may hold a token."""
    secret: SecretStr
    """`${NAME}`: the key of the signature, shared with the receiver; 16 characters or more."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """How long one answer may take; then the document is tried again."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """How many documents, of different keys, are on their way at once."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("expected http://… or https://…")
        return url

    @field_validator("secret")
    @classmethod
    def _is_long(cls, secret: SecretStr) -> SecretStr:
        if len(secret.get_secret_value()) < 16:
            raise ValueError("a key of fewer than 16 characters can be guessed; make one with `openssl rand -hex 32`")
        return secret


Connection = Annotated[
    PostgresConnection | MySqlConnection | OpenSearchConnection | RedisConnection | KafkaConnection | WebhookConnection,
    Field(discriminator="kind"),
]
"""Any of them, told apart by `kind`."""

CONNECTIONS: tuple[type[BaseModel], ...] = (
    PostgresConnection,
    MySqlConnection,
    OpenSearchConnection,
    RedisConnection,
    KafkaConnection,
    WebhookConnection,
)
"""Their models, in the order of the manual."""
