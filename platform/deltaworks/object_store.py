"""Object stores that speak S3: who signs, what their answers mean, and whether one keeps a promise.

A store that takes `PUT … If-None-Match: *` promises that of two writers of one new object the second one is
refused. Whoever takes turns through it relies on that, and about half of the services that speak S3 accept
both writers and say nothing. So a store is written to only where the promise was seen to hold:

    PUT <prefix>/.deltaworks/first-writer   If-None-Match: *    200, or 412 when an earlier start wrote it
    PUT <prefix>/.deltaworks/first-writer   If-None-Match: *    412, or this store is refused

The object stays, so that every later start asks once and writes nothing. The lake's data and the archives of
logs are kept in such stores; boto3 is imported here only, where one is used.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from deltaworks.config import S3Config
from deltaworks.errors import RetryableError, TerminalError

PROBE = ".deltaworks/first-writer"
"""The probe's object, below the prefix; DuckLake's own files end in `.parquet`, a log's in `.sealed`."""

_REFUSED = (409, 412)
"""Conflict (two at the same time) and precondition failed, the answers that S3 gives to a second writer."""
_NO_SUCH_ABILITY = (400, 501)
_DENIED = (401, 403)
_GARBLED = ("BadDigest", "InvalidDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch")
"""A request that was hurt on its way, also answered with 400."""
_ELSEWHERE = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")
"""The bucket is in another region than the one that was signed for."""


class ObjectStoreDownError(RetryableError):
    """The object store does not answer, or answers with an error of its own."""


class ObjectStoreDeniedError(TerminalError):
    """The object store does not let these keys work there, there are none, or there is no such bucket."""


class ConditionalWriteError(TerminalError):
    """The object store accepts a second writer where it has to refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a store is for, in the words of messages.

    `purpose` follows "cannot"; `setting` and `endpoint` are those of deltaworks.yaml to look at; `otherwise` is what
    to do where no store fits, and `keys` where to set keys other than in the environment.
    """

    purpose: str
    setting: str
    endpoint: str
    otherwise: str
    keys: str


LAKE = Use(
    purpose="keep a lake",
    setting="lake.data",
    endpoint="lake.s3.endpoint",
    otherwise="set lake.data in deltaworks.yaml to a folder",
    keys="set lake.s3.access_key_id in deltaworks.yaml to ${NAME}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What signs requests; hidden in `repr`."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStore:
    """A bucket, a prefix in it, and the service that has them."""

    bucket: str
    prefix: str
    config: S3Config
    use: Use = LAKE

    @classmethod
    def at(cls, address: str, config: S3Config, use: Use = LAKE) -> "ObjectStore":
        """The store of `s3://bucket/prefix`; asks nobody."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return cls(bucket=bucket, prefix=prefix.strip("/"), config=config, use=use)

    @property
    def address(self) -> str:
        """The prefix as a URL."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def service(self) -> str:
        """The service in words, for messages."""
        return repr(self.config.endpoint) if self.config.endpoint else f"AWS in region {self.config.region!r}"

    def keys(self) -> Keys:
        """What is configured or, where nothing is, what AWS's own rules find now: such keys may expire.

        Raises:
            ObjectStoreDeniedError: no keys are configured and none are found.
            MissingExtraError: the libraries of `deltaworks[aws]` are not installed.
        """
        return _configured_keys(self.config) or _found_keys(self)

    def client(self) -> Any:  # Any: boto3 makes its clients at run time and declares no types
        """A boto3 client of this service, to be closed."""
        boto3, botocore = _libraries()
        # Keys that were found are not given to it: it finds them itself, and anew before they expire.
        configured, _ = _configured_keys(self.config), self.keys()
        # A session of its own: the one that boto3 shares is not thread-safe.
        return boto3.Session().client(
            "s3",
            endpoint_url=self.config.endpoint,
            region_name=self.config.region,
            aws_access_key_id=configured and configured.access_key_id,
            aws_secret_access_key=configured and configured.secret_access_key,
            aws_session_token=configured and configured.session_token,
            config=botocore.config.Config(
                connect_timeout=5,
                read_timeout=20,
                # A PUT that is sent again after a lost answer would be its own second writer.
                retries={"total_max_attempts": 1},
                # Look-alikes do not know the newer checksums.
                request_checksum_calculation="when_required",
                s3={"addressing_style": "path" if self.config.endpoint else "auto"},
            ),
        )

    def refuse_second_writer(self) -> None:
        """See that the store refuses the second of two writers of one object; costs one or two small requests.

        Raises:
            ConditionalWriteError: it takes both, or does not know the condition.
            ObjectStoreDeniedError: the keys may not write there, or there is no such bucket.
            ObjectStoreDownError: it does not answer.
        """
        with self.opened() as client:
            client.refuse_second_writer()

    @contextmanager
    def opened(self) -> Iterator["StoreClient"]:
        """A connection to the service for a while."""
        client = self.client()
        try:
            yield StoreClient(self, client)
        finally:
            client.close()

    def url(self, name: str) -> str:
        """The address of an object below the prefix."""
        return f"{self.address}/{name}"

    def key(self, name: str) -> str:
        """Its key in the bucket."""
        return f"{self.prefix}/{name}".lstrip("/")


@dataclass(frozen=True, slots=True)
class StoreClient:
    """Objects below a store's prefix, by their name there. Every method raises what `judged` says."""

    store: ObjectStore
    s3: Any  # Any: boto3 makes its clients at run time and declares no types

    def refuse_second_writer(self) -> None:
        """See `ObjectStore.refuse_second_writer`."""
        if self.put_first(PROBE, b"") and self.put_first(PROBE, b""):
            store, use = self.store, self.store.use
            raise ConditionalWriteError(
                f"cannot {use.purpose} on {store.service}: it accepted two writers of {store.url(PROBE)!r} that both "
                "asked to be the first (If-None-Match: *); use a store that refuses the second one, or "
                f"{use.otherwise}"
            )

    def put_first(self, name: str, body: Any, **more: Any) -> bool:  # Any: bytes or a file; what boto3 takes
        """Write an object unless there is one of that name: whether it was written."""
        with self.judged("write", name) as answer:
            self.s3.put_object(Bucket=self.store.bucket, Key=self.store.key(name), Body=body, IfNoneMatch="*", **more)
        return answer.status not in _REFUSED

    def metadata(self, name: str) -> Mapping[str, str] | None:
        """What was written beside an object, and its `size`; `None` where there is no such object."""
        with self.judged("read", name) as answer:
            found = self.s3.head_object(Bucket=self.store.bucket, Key=self.store.key(name))
            return {**found.get("Metadata", {}), "size": str(found["ContentLength"])}
        return None if answer.status else {}

    def read(self, name: str, into: IO[bytes]) -> bool:
        """Copy an object into a file; `False` where there is no such object."""
        with self.judged("read", name) as answer:
            found = self.s3.get_object(Bucket=self.store.bucket, Key=self.store.key(name))
            with closing(found["Body"]) as body:
                shutil.copyfileobj(body, into, 1 << 20)
        return not answer.status

    def names(self, below: str) -> Iterator[str]:
        """The names of all objects whose name begins so, in order."""
        token: dict[str, str] = {}
        while True:
            with self.judged("list", below):
                page = self.s3.list_objects_v2(Bucket=self.store.bucket, Prefix=self.store.key(below), **token)
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(self.store.key(""))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    @contextmanager
    def judged(self, doing: str, name: str) -> Iterator["_Answer"]:
        """Say in our errors what the service answers; a refused second writer and a missing object are no errors.

        Raises:
            ObjectStoreDownError: the service does not answer, or with an error of its own.
            ObjectStoreDeniedError: the keys may not do that, or there is no such bucket.
            ConditionalWriteError: it does not know the condition of a write.
        """
        _, botocore = _libraries()
        answer = _Answer()
        try:
            yield answer
        except botocore.exceptions.ClientError as error:
            answer.status = self._judge(doing, name, error)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.HTTPClientError) as error:
            raise ObjectStoreDownError(
                f"cannot reach {self.store.service} to {doing} {self.store.url(name)!r}: {type(error).__name__}; is "
                f"{self.store.use.endpoint} right and the service up?"
            ) from error

    def _judge(self, doing: str, name: str, error: Any) -> int:  # Any: botocore declares no types
        store, use = self.store, self.store.use
        status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = error.response.get("Error", {}).get("Code", "")
        if doing == "write" and status in _REFUSED:
            return status
        if doing == "read" and status == 404 and code != "NoSuchBucket":
            return status
        said = f"cannot {doing} {store.url(name)!r} on {store.service}"
        if code in _ELSEWHERE:
            raise ObjectStoreDeniedError(
                f"{said}: {code!r}; the bucket is not in region {store.config.region!r}: set its region beside "
                f"{use.setting}"
            ) from error
        if doing == "write" and status in _NO_SUCH_ABILITY and code not in _GARBLED:
            raise ConditionalWriteError(
                f"cannot {use.purpose} on {store.service}: it answers {code!r} to a write that asks to be the first "
                f"(If-None-Match: *); use a store that knows it, or {use.otherwise}"
            ) from error
        if status in _DENIED or status == 404:
            raise ObjectStoreDeniedError(
                f"{said}: {code!r}; look at {use.setting}, at the bucket's policy, and at the keys in the environment"
            ) from error
        raise ObjectStoreDownError(f"{said}: it answers {status} {code!r}; try again later") from error


@dataclass(slots=True)
class _Answer:
    """The status of an answer that is no error and not what was asked for either; 0 for what was asked for."""

    status: int = 0


class MissingExtraError(TerminalError):
    """A library that this configuration needs is not installed."""


def _configured_keys(config: S3Config) -> Keys | None:
    if config.access_key_id is None or config.secret_access_key is None:
        return None
    token = config.session_token
    return Keys(
        access_key_id=config.access_key_id.get_secret_value(),
        secret_access_key=config.secret_access_key.get_secret_value(),
        session_token=None if token is None else token.get_secret_value(),
    )


def _found_keys(store: ObjectStore) -> Keys:
    boto3, botocore = _libraries()
    config, address = store.config, store.address
    try:
        found = boto3.Session(region_name=config.region).get_credentials()
        frozen = None if found is None else found.get_frozen_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise ObjectStoreDeniedError(
            f"cannot find keys for {address!r}: {type(error).__name__}; mend AWS's own configuration, or "
            f"{store.use.keys}"
        ) from error
    if frozen is None:
        raise ObjectStoreDeniedError(
            f"cannot find keys for {address!r}: the environment has no AWS_ACCESS_KEY_ID and this machine has no role; "
            f"set it, or {store.use.keys}"
        )
    return Keys(access_key_id=frozen.access_key, secret_access_key=frozen.secret_key, session_token=frozen.token)


def _libraries() -> tuple[Any, Any]:  # Any: neither library declares types
    """boto3 and botocore, imported when a store is used: it takes half a second and is in an extra."""
    try:
        import boto3  # noqa: PLC0415
        import botocore.config  # noqa: PLC0415
        import botocore.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "cannot use an object store: boto3 is not installed; install it with `pip install 'deltaworks[aws]'`"
        ) from error
    return boto3, botocore
