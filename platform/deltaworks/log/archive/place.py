"""Where the archive of a log is: its store, and what its objects are called.

s3://<bucket>/<prefix>/<log>/00000000000000018021.sealed     the bytes of the file of that name
metadata: sha256, last (its last group), position (where the log stood after it)
"""

from dataclasses import dataclass
from io import BytesIO

from deltaworks.config import ArchiveConfig, S3Config
from deltaworks.errors import TerminalError
from deltaworks.log.change_log import CorruptLogError
from deltaworks.object_store import PROBE, ObjectStore, Use

_USE = Use(
    purpose="archive a log",
    setting="log.archive",
    endpoint="log.archive.endpoint",
    otherwise="leave log.archive out of deltaworks.yaml",
    keys="give this machine a role or a profile of AWS's own configuration",
)


class ArchiveConflictError(TerminalError):
    """The archive has another content under a segment's name; nothing was overwritten and archiving stops there."""


class CorruptArchiveError(CorruptLogError):
    """A segment comes back from the archive otherwise than it went there."""


@dataclass(frozen=True, slots=True)
class ArchivePlace:
    """The archive of one log."""

    log: str
    store: ObjectStore

    @classmethod
    def of(cls, log: str, settings: ArchiveConfig) -> "ArchivePlace":
        """The place that the settings of a log name; asks nobody."""
        service = S3Config(endpoint=settings.endpoint, region=settings.region)
        return cls(log, ObjectStore(bucket=settings.bucket, prefix=settings.prefix, config=service, use=_USE))

    def object(self, file_name: str) -> str:
        """What a segment file is called in the store."""
        return f"{self.log}/{file_name}"

    def url(self, file_name: str = "") -> str:
        """Its address, for people."""
        return self.store.url(self.object(file_name))


def check_archive(place: ArchivePlace) -> None:
    """See that the store takes, gives and lists objects, and refuses the second of two writers; it keeps a small one.

    Raises:
        ConditionalWriteError: it takes both writers, or does not know the condition.
        ObjectStoreDeniedError: there are no keys, they may not do that, or there is no such bucket.
        ObjectStoreDownError: it does not answer.
        MissingExtraError: the libraries of `deltaworks[aws]` are not installed.
    """
    with place.store.opened() as client:
        client.refuse_second_writer()
        client.read(PROBE, BytesIO())
        next(client.names(place.object("")), None)
