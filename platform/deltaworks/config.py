"""`deltaworks.yaml`: one model, parsed and checked once, all faults reported together.

`${NAME}` and `${NAME:-default}` in any text are replaced from the environment given to `load`.
Relative paths are relative to the file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from deltaworks.connection import UNTOLD, Connection
from deltaworks.errors import TerminalError
from deltaworks.schema import TableName, TablePattern, is_pattern

_T = TypeVar("_T")
_C = TypeVar("_C", bound=BaseModel)
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")

_S3_ADDRESS = re.compile(r"s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/.*)?")
_S3_KEYS = ("access_key_id", "secret_access_key", "session_token")
_UNTOLD = (*UNTOLD, "catalog", *_S3_KEYS)
"""Settings that may hold a password; no message repeats what they were given."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")]
"""Names become slots, folders, schemas and asset keys, so they keep to what all of those take."""


class ConfigError(TerminalError):
    """The configuration cannot be used; the message lists every fault."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ArchiveConfig(_Model):
    """S3, or a store with its API, where closed segments of a local log are kept for good. Needs
    `pip install deltaworks[aws]`; keys are those that AWS's own rules find: environment, profile, role.
    """

    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
    """An existing bucket. The keys need `s3:PutObject`, `s3:GetObject` and `s3:ListBucket` in it, nothing to remove."""
    prefix: Annotated[str, Field(pattern=r"^([\w.=-]+(/[\w.=-]+)*)?$")] = "deltaworks"
    """What the objects' names begin with; the log of a source is below `<prefix>/<source>/`."""
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")] | None = None
    """`https://host:port` of a service that speaks S3; AWS when left out."""
    region: str = "us-east-1"
    """The bucket's region."""
    cache_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """What copies of segments that readers fetched from the archive may take under `home`, but for the newest one."""


class LocalLogConfig(_Model):
    """A change log in a folder of this machine, under `home`."""

    kind: Literal["local"] = "local"
    """Where the log lives."""
    keep_hours: Annotated[float, Field(gt=0)] | None = None
    """Segments older than this are removed once every app and the lake have read them; none for their age when left
    out. Without any of these four settings the log keeps everything."""
    keep_bytes: Annotated[int, Field(ge=0)] | None = None
    """What the log keeps at least; older segments are removed once every app and the lake have read them."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Segments older than this are removed although an app or the lake has not read them: it is left behind."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """What the log keeps at most, by segments, read or not: who has not read them is left behind."""
    archive: ArchiveConfig | None = None
    """Where segments are copied to once nobody writes to them; readers go on from there, and nothing is removed here
    before it is there."""
    segment_bytes: Annotated[int, Field(ge=1 << 16)] = 64 << 20
    """Where a segment ends and the next one begins: what retention removes and an archive takes at once, and what of a
    log is not in its archive yet."""
    seal: bool = True
    """Compress segments in the background once they are closed. One that is sealed stays so, and is read the same."""
    seal_level: Annotated[int, Field(ge=1, le=19)] = 1
    """How hard zstd tries."""

    @property
    def is_kept_whole(self) -> bool:
        """Whether nothing is ever removed."""
        return (self.keep_hours, self.keep_bytes, self.max_hours, self.max_bytes) == (None,) * 4

    @model_validator(mode="after")
    def _maximum_is_not_less(self) -> "LocalLogConfig":
        for unit in ("hours", "bytes"):
            keep, most = getattr(self, f"keep_{unit}"), getattr(self, f"max_{unit}")
            if keep is not None and most is not None and most < keep:
                raise ValueError(f"max_{unit} is less than keep_{unit}")
        return self


class KafkaLogConfig(_Model):
    """A change log on Apache Kafka, for when one machine is not enough. Needs `pip install deltaworks[kafka]`."""

    kind: Literal["kafka"]
    """Where the log lives."""
    brokers: Annotated[str, Field(min_length=1)]
    """`host:port`, several separated by commas; the first that answers tells of the others."""
    topics: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,150}$")] | None = None
    """What the topics' names begin with; `deltaworks.<source>` when left out."""
    partitions: Annotated[int, Field(ge=1, le=1_000)] = 6
    """Partitions of the changes, chosen by a hash of table and key; fixed once the topic is made."""
    replication_factor: Annotated[int, Field(ge=1, le=9)] = 3
    """Copies of every record, for topics that the writer makes."""
    max_record_bytes: Annotated[int, Field(ge=10_000, le=500_000_000)] = 1_000_000
    """Where a record ends and the next begins; at most the brokers' `max.message.bytes`, less a little."""
    retention_hours: Annotated[float, Field(gt=0)] | None = None
    """How long records are kept, for topics that the writer makes; for ever when left out."""
    debezium: Literal["all"] | tuple[str, ...] = ()
    """Tables (`schema.table`) whose changes are also written as JSON in Debezium's envelope, each to the topic
    `<topics>.<schema>.<table>`, for consumers that are not ours; `all` for every table."""
    debezium_transactions: bool = False
    """Also write where source transactions begin and end, with how many events of each of these tables, to the topic
    `<topics>.transaction`, as Debezium's `provide.transaction.metadata` does."""
    compression: Literal["none", "lz4", "zstd", "snappy", "gzip"] = "lz4"
    """How records are compressed on the way and on the brokers' disks."""
    patience_s: Annotated[float, Field(ge=1, le=800)] = 60.0
    """How long one append waits for brokers before it says that they are away; it is then tried again."""
    member_timeout_s: Annotated[float, Field(ge=1, le=300)] = 10.0
    """After how long without a sign of life others take the shares of a member, where an app has `shares`; at least
    the brokers' `group.min.session.timeout.ms`."""
    allow_weak_topics: bool = False
    """Take topics that can lose what they acknowledged: a broker for development. Said aloud at every start."""
    client: Mapping[str, Any] = Field(default_factory=dict, repr=False)
    """Settings of librdkafka for every client, such as `security.protocol` and `sasl.password`."""


LogConfig = Annotated[LocalLogConfig | KafkaLogConfig, Field(discriminator="kind")]


class PostgresConfig(_Model):
    """A PostgreSQL database to capture from."""

    kind: Literal["postgres"]
    """What speaks the source's protocol."""
    dsn: SecretStr
    """A libpq connection string or URL; the role needs REPLICATION and SELECT on the tables."""
    dump_dsn: SecretStr | None = None
    """A physical standby of the same server, which dumps are read from; the server itself when left out."""
    tables: Annotated[tuple[str, ...], Field(min_length=1)]
    """`name` or `schema.name`, in the order they are dumped. With a `*`, as in `shop.*` or `order_*`, every table that
    fits now or later, also under a new name; `check` says of those that cannot be captured why they are left out."""
    slot: str | None = None
    """The replication slot, made when it is missing; `deltaworks_<source>` when left out."""
    publication: str | None = None
    """The publication, made when it is missing and the role may; `deltaworks_<source>` when left out."""
    chunk_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 500_000
    """Rows of a dump chunk at most; how many it has follows from `dump_chunk_s`, and from 32 MB of text."""
    dump_chunk_s: Annotated[float, Field(gt=0, le=60)] = 0.2
    """How long reading one chunk of a dump may take; what a crash can repeat, and how long one transaction is open."""
    stream_format: Literal["text", "binary"] = "text"
    """How the server sends values in the stream; they come out the same. `binary` holds where every column of the
    captured tables is of a type that is read so (numbers, times, texts, bytes, uuid, json), and is text otherwise."""
    on_gap: Literal["repair", "stop"] = "repair"
    """What to do when the server no longer has changes that were not captured: `repair` raises an alarm, makes a new
    slot and dumps the tables again; `stop` raises the alarm and waits for a person."""
    slot_alarm_bytes: Annotated[int, Field(ge=1)] = 10 << 30
    """Log that the server keeps for the slot beyond which capture warns; 10 GiB fit on most servers' disks."""
    log: LogConfig = LocalLogConfig()
    """Where the changes are kept between the source and what is derived from it."""
    lease_s: Annotated[float, Field(ge=2.0, le=300.0)] = 6.0
    """How long a reader that stopped answering keeps its place; then a standby takes over."""
    canary_s: Annotated[float, Field(ge=1.0, le=3600.0)] | None = 30.0
    """How often the capture service writes a message of ours into the source's log and waits for it, so that how old a
    place may be is measured while nobody writes, and the slot moves on an idle database; never where it is null."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where `deltaworks capture` gives its Prometheus metrics on the loopback interface; nowhere when left out."""
    owner: str = "data-platform"
    """The team that owns the source's assets in Dagster."""

    @field_validator("tables")
    @classmethod
    def _tables_differ(cls, tables: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({table for table in tables if tables.count(table) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return tables

    @property
    def table_names(self) -> tuple[TableName, ...]:
        """The tables that are named, parsed."""
        return tuple(TableName.parse(table) for table in self.tables if not is_pattern(table))

    @property
    def table_patterns(self) -> tuple[TablePattern, ...]:
        """What other tables are captured too."""
        return tuple(TablePattern.parse(table) for table in self.tables if is_pattern(table))


class S3Config(_Model):
    """The service behind a lake's `s3://` data. Without keys, those of AWS's own rules: profile, role, environment."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")] | None = None
    """`https://host:port` of a service that speaks S3; AWS when left out."""
    region: str = "us-east-1"
    """The bucket's region."""
    access_key_id: SecretStr | None = None
    """`${NAME}`: a key comes from the environment, never from the file."""
    secret_access_key: SecretStr | None = None
    """`${NAME}`, given together with `access_key_id`."""
    session_token: SecretStr | None = None
    """`${NAME}`, for keys that expire."""

    @field_validator(*_S3_KEYS, mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return value or None

    @model_validator(mode="after")
    def _keys_come_together(self) -> "S3Config":
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key belong together; one of them is empty")
        return self


class LakeConfig(_Model):
    """The DuckLake that every load writes to."""

    catalog: Annotated[str, Field(pattern=r"^(sqlite|postgres):.", repr=False)] = "sqlite:{home}/lake/catalog.sqlite"
    """`sqlite:FILE`, or `postgres:` with a libpq connection string or URL; `{home}` stands for the home folder."""
    data: Annotated[str, Field(min_length=1)] = "{home}/lake/data"
    """A folder or an `s3://bucket/prefix`."""
    s3: S3Config = Field(default_factory=S3Config)
    """The service that keeps `s3://` data."""

    @field_validator("data")
    @classmethod
    def _is_a_folder_or_on_s3(cls, data: str) -> str:
        if "://" in data and _S3_ADDRESS.fullmatch(data) is None:
            raise ValueError("expected a folder or s3://bucket/prefix")
        return data


class AppConfig(_Model):
    """A stream app: where its object is, and what its clients connect to."""

    module: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:name_of_the_app`."""
    source: Name
    """The source whose log it reads; the same that the app's module names."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """Handed to the app's steps, e.g. the address of a service they call."""
    step_limit_s: Annotated[float, Field(gt=0)] | None = 60.0
    """A step that has not returned in so many seconds is ended, and its change becomes a dead letter; a step over Arrow
    tables has them for each table. Steps are only named and never ended where it is null."""
    shares: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Into how many shares its entities are divided, so that as many `deltaworks process` at most work on it, on any
    machines; one process alone when left out. Needs a log on Kafka; to change it, see the guide to Kafka."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where `deltaworks process` gives its Prometheus metrics on the loopback interface; nowhere when left out."""


class ServeConfig(_Model):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """The address it listens on; the loopback interface unless you say otherwise."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8400
    """The TCP port."""
    app: Name | None = None
    """The app whose search index the search page shows; the only app that has one when left out."""
    operators: Literal["this machine", "anyone", "nobody"] = "this machine"
    """Who may pause, resume and retry apps on the page `/apps`: `anyone` is for a server behind a proxy that asks who
    it is."""


class Config(_Model):
    """Everything in `deltaworks.yaml`."""

    home: Path = Path(".deltaworks")
    """The folder of all local state: log, lake, index, checkpoints."""
    sources: Annotated[Mapping[Name, PostgresConfig], Field(min_length=1)]
    """The databases to capture, by name."""
    apps: Mapping[Name, AppConfig] = Field(default_factory=dict)
    """The stream apps, by name."""
    connections: Mapping[Name, Connection] = Field(default_factory=dict)
    """The servers that sinks write to, by name."""
    lake: LakeConfig = Field(default_factory=LakeConfig)
    """Where the lakehouse is."""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """Where the search page is served."""

    def source(self, name: str) -> PostgresConfig:
        """The source of that name.

        Raises:
            ConfigError: unknown; the message lists those that are known.
        """
        return _known(self.sources, name, "source")

    def app(self, name: str) -> AppConfig:
        """The app of that name.

        Raises:
            ConfigError: unknown; the message lists those that are known.
        """
        return _known(self.apps, name, "app")

    def connection(self, name: str, kind: type[_C]) -> _C:
        """The connection of that name, which has to be of this kind.

        Raises:
            ConfigError: unknown or of another kind; the message lists those that would do.
        """
        found = self.connections.get(name)
        if not isinstance(found, kind):
            of_kind = [known for known, connection in self.connections.items() if isinstance(connection, kind)]
            fault = "no connection" if found is None else f"a {found.kind} connection, not {kind.__name__}, is"
            raise ConfigError(f"{fault} {name!r} in deltaworks.yaml; known: {', '.join(of_kind) or 'none'}")
        return found

    def log_settings(self, name: str) -> LocalLogConfig | KafkaLogConfig:
        """How the log of a source, or of an app that writes to the lake, is kept; an app's is always local."""
        return self.sources[name].log if name in self.sources else LocalLogConfig()

    def log_folder(self, name: str) -> Path:
        """The folder of a log, or of what its writer keeps here when the log is elsewhere; see `log.registry`."""
        return self.home / "log" / name

    def archive_cache_folder(self, name: str) -> Path:
        """Copies of segments that were fetched from a log's archive; may be removed at any time."""
        return self.home / "archive_cache" / name

    def dump_folder(self, source: str) -> Path:
        """The requests for dumps of a source, and how they ended."""
        return self.home / "dumps" / source

    def app_folder(self, app: str) -> Path:
        """Checkpoint and state of an app."""
        return self.home / "process" / app

    def index_folder(self, app: str) -> Path:
        """The embedded search index of an app."""
        return self.home / "search" / app

    @property
    def lake_catalog(self) -> str:
        """`lake.catalog` with the home folder filled in."""
        return self.lake.catalog.replace("{home}", str(self.home))

    @property
    def lake_data(self) -> str:
        """`lake.data` with the home folder filled in."""
        return self.lake.data.replace("{home}", str(self.home))

    @property
    def extension_folder(self) -> Path:
        """Where DuckDB's extensions are unpacked to from their wheels."""
        return self.home / "duckdb_extensions"


def load(path: Path, *, environment: Mapping[str, str]) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file is missing, is not YAML, or has faults; all of them are listed.
    """
    try:
        with path.open(encoding="utf-8") as file:
            document = yaml.load(file, Loader=_OneOfEach)  # noqa: S506  # a safe loader
    except FileNotFoundError as error:
        raise ConfigError(
            f"cannot find the configuration {str(path)!r}; run from the folder that has it or pass --config"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {str(path)!r} as YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"cannot use {str(path)!r}: expected a mapping with 'sources', got {document!r:.40}")
    unset: list[str] = []
    filled = _fill(document, environment, unset)
    faults = [f"{name}: not set in the environment and has no default" for name in dict.fromkeys(unset)]
    faults += _written_out(document) + _passwords_written_out(document)
    config: Config | None = None
    try:
        config = Config.model_validate(filled)
    except ValidationError as error:
        faults += [_fault(item) for item in error.errors(include_url=False)]
    else:
        faults += _loose_ends(config)
    if faults or config is None:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"cannot use {str(path)!r}, {len(faults)} to mend:\n{listing}")
    return config.model_copy(update={"home": (path.parent / config.home).resolve()})


class _OneOfEach(yaml.SafeLoader):
    """Refuses a name that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # Any: YAML values
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if (first := lines.setdefault(key.value, line)) != line:
                    raise ConfigError(
                        f"cannot use {self.name!r}: {key.value!r} is there twice, in lines {first} and {line}; "
                        "rename one or remove it"
                    )
        return super().construct_mapping(node, deep=deep)


def _fill(value: Any, environment: Mapping[str, str], unset: list[str]) -> Any:  # Any: YAML is any JSON-like value
    if isinstance(value, dict):
        return {key: _fill(item, environment, unset) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, environment, unset) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        found = environment.get(match["name"], match["default"])
        if found is None:
            unset.append(match["name"])
        return found or ""

    return _VARIABLE.sub(replace, value)


def _fault(item: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in item["loc"])
    given = item.get("input")
    # A secret or a whole section is no help in a message; only plain values are repeated.
    shown = f", got {given!r}" if _is_plain(given) and not place.endswith(_UNTOLD) else ""
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _is_plain(given: object) -> bool:
    return isinstance(given, (int, float, bool)) or (isinstance(given, str) and len(given) < 80)


def _written_out(document: Mapping[str, Any]) -> list[str]:
    """Keys that stand in the file itself."""
    lake = document.get("lake")
    s3 = lake.get("s3") if isinstance(lake, dict) else None
    given = {name: s3[name] for name in _S3_KEYS if name in s3} if isinstance(s3, dict) else {}
    references = {name: _VARIABLE.fullmatch(str(value)) for name, value in given.items()}
    return [
        f"lake.s3.{name}: a key must not stand in the file; write ${{NAME}} and set NAME in the environment"
        for name, reference in references.items()
        if reference is None or reference["default"]
    ]


def _passwords_written_out(document: Mapping[str, Any]) -> list[str]:
    """Passwords and signing keys of connections that stand in the file itself."""
    connections = document.get("connections")
    found = connections.items() if isinstance(connections, dict) else ()
    return [
        f"connections.{name}.{setting}: a secret must not stand in the file; write ${{NAME}} and set NAME in the "
        "environment"
        for name, settings in found
        if isinstance(settings, dict)
        for setting in ("password", "secret")
        if settings.get(setting) and _VARIABLE.fullmatch(str(settings[setting])) is None
    ]


def _loose_ends(config: Config) -> list[str]:
    faults = [
        f"apps.{name}.source: no source {app.source!r}; known: {', '.join(config.sources)}"
        for name, app in config.apps.items()
        if app.source not in config.sources
    ]
    faults += [
        f"apps.{name}: a source has this name too; both own the folder log/{name}"
        for name in config.apps
        if name in config.sources
    ]
    if config.serve.app is not None and config.serve.app not in config.apps:
        faults.append(f"serve.app: no app {config.serve.app!r}; known: {', '.join(config.apps) or 'none'}")
    return faults


def _known(section: Mapping[str, _T], name: str, kind: str) -> _T:
    if name not in section:
        raise ConfigError(f"no {kind} {name!r} in deltaworks.yaml; known: {', '.join(section) or 'none'}")
    return section[name]
