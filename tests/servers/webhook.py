"""A receiver of webhooks as a partner would write it: checks who sent it, forgets repeats, keeps the newest."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deltaworks.store.sinks.webhook import is_authentic

SECRET = "the-secret-of-this-partner"


class Receiver:
    """An HTTP server on 127.0.0.1."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        """Bodies in the order they came, repeats included, with `idempotency_key`."""
        self.held: dict[Any, tuple[tuple[int, int], Any]] = {}
        self.answers: list[tuple[int, dict[str, str]]] = []
        """Statuses and headers to answer with next; 204 when there are no more."""
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers = receiver.take(body, dict(self.headers))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep pytest's output to the tests."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A caller that hangs up is no news here."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
        """What to answer."""
        with self._lock:
            if not is_authentic(body, headers, secret=SECRET, now=time.time()):
                return 401, {}
            event = json.loads(body)
            self.requests.append(event | {"idempotency_key": headers["Idempotency-Key"]})
            if self.answers:
                status, more = self.answers.pop(0)
                if not 200 <= status < 300:
                    return status, more
            document = event["document"]
            if document is not None and document.get("votes") == "secret many":
                return 422, {}
            version = (event["position"], event["ordinal"])
            if event["key"] not in self.held or self.held[event["key"]][0] <= version:
                self.held[event["key"]] = (version, document)
            return 204, {}

    def documents(self) -> dict[Any, Any]:
        """The live documents by key."""
        with self._lock:
            return {key: body for key, (_, body) in self.held.items() if body is not None}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.stop()
