"""The object store behind a lake's `s3://` data: its keys, and whether it keeps a promise.

A store that takes `PUT … If-None-Match: *` promises that of two writers of one new object the second one is
refused. Whoever takes turns through it relies on that, and about half of the services that speak S3 accept
both writers and say nothing. So a lake is opened for writing only where the promise was seen to hold:

    PUT <prefix>/.deltaworks/first-writer   If-None-Match: *    200, or 412 when an earlier start wrote it
    PUT <prefix>/.deltaworks/first-writer   If-None-Match: *    412, or this store is refused

The object stays, so that every later start asks once and writes nothing.
"""

from dataclasses import dataclass, field
from typing import Any

from deltaworks.config import S3Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.store.secret import Secret

PROBE = ".deltaworks/first-writer"
"""The probe's object, below the prefix of the data; DuckLake's own files end in `.parquet`."""

_REFUSED = (409, 412)
"""Conflict (two at the same time) and precondition failed, the answers that S3 gives to a second writer."""
_NO_SUCH_ABILITY = (400, 501)
_DENIED = (401, 403)


class ObjectStoreDownError(RetryableError):
    """The object store does not answer, or answers with an error of its own."""


class ObjectStoreDeniedError(TerminalError):
    """The object store does not let these keys write there, or there are none."""


class ConditionalWriteError(TerminalError):
    """The object store accepts a second writer where it has to refuse it."""


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

    @classmethod
    def at(cls, address: str, config: S3Config) -> "ObjectStore":
        """The store of `s3://bucket/prefix`; asks nobody."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        return cls(bucket=bucket, prefix=prefix.strip("/"), config=config)

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
        return _configured_keys(self.config) or _found_keys(self.config, self.address)

    def client(self) -> Any:  # Any: boto3 makes its clients at run time and declares no types
        """A boto3 client of this service."""
        boto3, botocore = _libraries()
        keys = self.keys()
        return boto3.client(
            "s3",
            endpoint_url=self.config.endpoint,
            region_name=self.config.region,
            aws_access_key_id=keys.access_key_id,
            aws_secret_access_key=keys.secret_access_key,
            aws_session_token=keys.session_token,
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

    def secret(self) -> Secret:
        """The keys as DuckDB takes them, for this bucket only."""
        keys = self.keys()
        options: dict[str, str | bool] = {
            "key_id": keys.access_key_id,
            "secret": keys.secret_access_key,
            "region": self.config.region,
            "scope": f"s3://{self.bucket}/",
        }
        if keys.session_token is not None:
            options["session_token"] = keys.session_token
        if self.config.endpoint is not None:
            scheme, _, host = self.config.endpoint.partition("://")
            options |= {"endpoint": host, "use_ssl": scheme == "https", "url_style": "path"}
        return Secret(kind="s3", name="lake_data", options=options)

    def refuse_second_writer(self) -> None:
        """See that the store refuses the second of two writers of one object; costs one or two small requests.

        Raises:
            ConditionalWriteError: it takes both, or does not know the condition.
            ObjectStoreDeniedError: the keys may not write there, or there is no such bucket.
            ObjectStoreDownError: it does not answer.
        """
        client = self.client()
        try:
            if self._is_first(client) and self._is_first(client):
                raise ConditionalWriteError(
                    f"cannot keep a lake on {self.service}: it accepted two writers of {self._probe!r} that both asked "
                    "to be the first (If-None-Match: *); use a store that refuses the second one, or set lake.data "
                    "in deltaworks.yaml to a folder"
                )
        finally:
            client.close()

    @property
    def _probe(self) -> str:
        return f"{self.address}/{PROBE}"

    def _is_first(self, client: Any) -> bool:  # Any: see `client`
        _, botocore = _libraries()
        key = f"{self.prefix}/{PROBE}".lstrip("/")
        try:
            client.put_object(Bucket=self.bucket, Key=key, Body=b"", IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            return self._judge(error)
        except botocore.exceptions.BotoCoreError as error:
            raise ObjectStoreDownError(
                f"cannot reach {self.service} to write {self._probe!r}: {type(error).__name__}; is lake.s3.endpoint "
                "right and the service up?"
            ) from error
        return True

    def _judge(self, error: Any) -> bool:  # Any: botocore declares no types
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = error.response.get("Error", {}).get("Code", "")
        if status in _REFUSED:
            return False
        if status in _NO_SUCH_ABILITY:
            raise ConditionalWriteError(
                f"cannot keep a lake on {self.service}: it answers {code!r} to a write that asks to be the first "
                "(If-None-Match: *); use a store that knows it, or set lake.data in deltaworks.yaml to a folder"
            ) from error
        if status in _DENIED or status == 404:
            raise ObjectStoreDeniedError(
                f"cannot write {self._probe!r} on {self.service}: {code!r}; look at lake.data, at the bucket's "
                "policy, and at the keys in the environment"
            ) from error
        raise ObjectStoreDownError(
            f"cannot write {self._probe!r} on {self.service}: it answers {status} {code!r}; try again later"
        ) from error


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


def _found_keys(config: S3Config, address: str) -> Keys:
    boto3, botocore = _libraries()
    try:
        found = boto3.Session(region_name=config.region).get_credentials()
        frozen = None if found is None else found.get_frozen_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise ObjectStoreDeniedError(
            f"cannot find keys for {address!r}: {type(error).__name__}; mend AWS's own configuration, or set "
            "lake.s3.access_key_id in deltaworks.yaml to ${NAME}"
        ) from error
    if frozen is None:
        raise ObjectStoreDeniedError(
            f"cannot find keys for {address!r}: the environment has no AWS_ACCESS_KEY_ID and this machine has no role; "
            "set it, or set lake.s3.access_key_id in deltaworks.yaml to ${NAME}"
        )
    return Keys(access_key_id=frozen.access_key, secret_access_key=frozen.secret_key, session_token=frozen.token)


def _libraries() -> tuple[Any, Any]:  # Any: neither library declares types
    """boto3 and botocore, imported when a lake is on S3: it takes half a second and is in an extra."""
    try:
        import boto3  # noqa: PLC0415
        import botocore.config  # noqa: PLC0415
        import botocore.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "cannot use `s3://` data: boto3 is not installed; install it with `pip install 'deltaworks[aws]'`"
        ) from error
    return boto3, botocore
