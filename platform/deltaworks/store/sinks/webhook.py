"""A webhook as a sink: one signed POST for each document, for event-driven workflows.

    POST <url>
    Content-Type: application/json
    Idempotency-Key: 5f3c…                   the same for the same sink, key and version, also when sent again
    Deltaworks-Timestamp: 1793620000         seconds since 1970, when it was sent
    Deltaworks-Signature: v1=9a4b…           HMAC-SHA256 with the shared secret over  timestamp "." body

    {"sink": "releases", "key": 7, "position": 24, "ordinal": 0, "committed_at": "…", "document": {…} or null}

| answer                    | means                                                             |
|---------------------------|-------------------------------------------------------------------|
| 2xx                       | taken                                                             |
| 408, 425, 429, 5xx, none  | tried again, not before what `Retry-After` asks                   |
| 401, 403, 407, 3xx        | the receiver's door is shut or moved: tried again, nothing is lost |
| any other                 | this document is refused; the others go on                        |

Documents of one key are sent in order, those of different keys side by side. Delivery is at least once: a
receiver forgets what it has seen under an idempotency key, or compares (position, ordinal) and keeps the largest.
"""

import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from deltaworks.config import Config
from deltaworks.connection import WebhookConnection
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import UnsupportedBodyError, document_json
from deltaworks.process.sink import Capabilities, Document, Refusal, Sink, SinkAwayError, key_text
from deltaworks.process.step import retry_after_s

TIMESTAMP_HEADER = "Deltaworks-Timestamp"
SIGNATURE_HEADER = "Deltaworks-Signature"
IDEMPOTENCY_HEADER = "Idempotency-Key"
_COMES_BACK = frozenset({401, 403, 407, 408, 425, 429})


@dataclass(frozen=True, slots=True)
class Webhook:
    """An HTTP address that is told of every document; a `SinkSpec`.

    `connection` is a name under `connections:` in `deltaworks.yaml`, of kind `webhook`. With `deletions=False` it is
    not told of documents that are gone.

    >>> Webhook("releases", connection="partner").capabilities.is_event
    True
    """

    name: str
    connection: str = field(kw_only=True)
    deletions: bool = field(default=True, kw_only=True)

    @property
    def capabilities(self) -> Capabilities:
        """Each document counts; what the receiver keeps is its own affair."""
        return Capabilities(is_event=True)

    def open(self, *, app: str, key: str, config: Config) -> Sink:  # noqa: ARG002
        """Get ready to send; the receiver is first called with a document."""
        return WebhookSender(self, config.connection(self.connection, WebhookConnection))


class WebhookSender:
    """Sends what was written at the flush. Serves one thread; sends from several."""

    def __init__(self, spec: Webhook, connection: WebhookConnection) -> None:
        self.name = spec.name
        self._spec = spec
        self._connection = connection
        self._client = httpx.Client(timeout=connection.timeout_s, follow_redirects=False)
        self._pending: dict[Any, list[Document]] = {}
        self._taken: dict[Any, Version] = {}
        """What the receiver took in a flush that failed as a whole: it is not sent again."""
        self._refusals: dict[Any, Refusal] = {}

    def write(self, documents: Sequence[Document]) -> None:
        """See `Sink.write`; nothing leaves before the flush."""
        for document in documents:
            taken = self._taken.get(document.key)
            if (document.body is None and not self._spec.deletions) or (taken and document.version <= taken):
                continue
            waiting = self._pending.setdefault(document.key, [])
            if not waiting or waiting[-1].version < document.version:
                waiting.append(document)
            elif waiting[-1].version == document.version:
                # The same event, made again after a flush that failed.
                waiting[-1] = document

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:  # noqa: ARG002
        """Send, and wait for every answer."""
        faults = []
        with ThreadPoolExecutor(self._connection.concurrency) as threads:
            for fault in threads.map(self._send_all, list(self._pending.values())):
                faults += [fault] if fault else []
        self._pending = {key: left for key, left in self._pending.items() if left}
        if faults:
            asked = [fault.after_s for fault in faults if fault.after_s is not None]
            raise SinkAwayError(
                f"{len(faults)} keys of webhook {self.name!r} wait: {faults[0]}", after_s=max(asked, default=None)
            )
        refusals = list(self._refusals.values())
        self._refusals.clear()
        self._taken.clear()
        return refusals

    def close(self) -> None:
        """See `Sink.close`."""
        self._client.close()

    def _send_all(self, documents: list[Document]) -> SinkAwayError | None:
        """Send the documents of one key in order; those that were answered leave the list."""
        while documents:
            document = documents[0]
            try:
                reason = self._send(document)
            except SinkAwayError as error:
                return error
            if reason is not None:
                self._refusals[document.key] = Refusal(key=document.key, version=document.version, reason=reason)
            self._taken[document.key] = document.version
            del documents[0]
        return None

    def _send(self, document: Document) -> str | None:
        """Send one document; gives why it is refused, if it is."""
        try:
            body = _body(self.name, document)
        except UnsupportedBodyError as error:
            return str(error)
        headers = {
            "Content-Type": "application/json",
            IDEMPOTENCY_HEADER: _idempotency_key(self.name, document),
            **signed(body, secret=self._connection.secret.get_secret_value(), timestamp=int(time.time())),
        }
        try:
            response = self._client.post(self._connection.url.get_secret_value(), content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # The error may repeat the address, which may hold a token.
            raise SinkAwayError(f"no answer ({type(error).__name__}); it is tried again") from None
        status = response.status_code
        if 200 <= status < 300:
            return None
        if status < 400 or status in _COMES_BACK or status >= 500:
            after_s = retry_after_s(response.headers.get("retry-after"))
            raise SinkAwayError(f"the receiver answers {status}; it is tried again", after_s=after_s)
        return f"the receiver answers {status}"


def signed(body: bytes, *, secret: str, timestamp: int) -> Mapping[str, str]:
    """The headers that prove who sent a body, and when.

    >>> signed(b"{}", secret="k" * 16, timestamp=7)["Deltaworks-Signature"][:11]
    'v1=54319c0c'
    """
    message = str(timestamp).encode() + b"." + body
    digest = hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()
    return {TIMESTAMP_HEADER: str(timestamp), SIGNATURE_HEADER: f"v1={digest}"}


def is_authentic(
    body: bytes, headers: Mapping[str, str], *, secret: str, now: float, tolerance_s: float = 300.0
) -> bool:
    """What a receiver in Python asks before it believes a body; older than `tolerance_s` is a replay."""
    try:
        timestamp = int(headers[TIMESTAMP_HEADER])
        given = headers[SIGNATURE_HEADER]
    except (KeyError, ValueError):
        return False
    wanted = signed(body, secret=secret, timestamp=timestamp)[SIGNATURE_HEADER]
    return abs(now - timestamp) <= tolerance_s and hmac.compare_digest(given.encode(), wanted.encode())


def _body(sink: str, document: Document) -> bytes:
    return document_json(
        {
            "sink": sink,
            "key": document.key,
            "position": document.version.position.value,
            "ordinal": document.version.ordinal,
            "committed_at": document.committed_at,
            "document": document.body,
        }
    )


def _idempotency_key(sink: str, document: Document) -> str:
    # A key may be of any length and language, a header's value may not.
    version = document.version
    parts = json.dumps([sink, key_text(document.key), version.position.value, version.ordinal])
    return hashlib.sha256(parts.encode()).hexdigest()
