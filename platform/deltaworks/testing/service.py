"""A real HTTP service that answers, or fails, as a test tells it.

    def names(call):
        return {str(n): NAMES[n] for n in call.json["ids"]}

    with FakeService(names) as service:
        service.script(Status(503), Slow(2.0), Rubbish())      the next three answers; then the truth again
        …                                                      an app whose setting is service.url
        assert len(service.calls) == 4

It listens on the loopback interface on a free port, so what is tested is the client that production has: its pools,
its time limits, its reading of broken answers.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that came: `json` is its body, `None` without one."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # Any: JSON is any value
        """The body as JSON."""
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status; `retry_after` is the header of that name."""

    code: int
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Slow:
    """Answer truthfully, `seconds` later; with `answer` where the service's function gives this back itself."""

    seconds: float
    answer: Any = None


@dataclass(frozen=True, slots=True)
class Rubbish:
    """Answer with status 200 and what is no JSON and no text."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """Say how long the answer is, send half of it, and hang up; `answer` as with `Slow`."""

    answer: Any = None


Fault = Status | Slow | Rubbish | CutOff
"""What may go wrong with one answer."""


class FakeService:
    """An HTTP service on `url`. Thread-safe; `calls` are those that came, in the order they came.

    `answer` gives the JSON value for a call, or a `Fault`. `latency_s` is added to every answer.
    """

    def __init__(self, answer: Callable[[Call], Any], *, latency_s: float = 0.0) -> None:
        self.answer = answer
        self.latency_s = latency_s
        self.calls: list[Call] = []
        self._script: deque[Fault | None] = deque()
        self._handler = _handler(self)
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        """Where it listens; the same after `stop` and `start`."""
        return f"http://127.0.0.1:{self._port}"

    def script(self, *faults: Fault | None) -> None:
        """Let the next answers fail so, one after the other; `None` stands for a good one."""
        self._script.extend(faults)

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on; answers that were to be slow are sent at once. A second call does nothing."""
        self._stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _outcome(self, call: Call) -> tuple[Fault | None, Any]:
        """The fault that is due, and the true answer."""
        try:
            fault = self._script.popleft()
        except IndexError:
            fault = None
        answer = self.answer(call)
        if isinstance(answer, Fault):
            return fault or answer, getattr(answer, "answer", None)
        return fault, answer

    def _reply(self, handler: BaseHTTPRequestHandler, call: Call) -> None:
        self.calls.append(call)
        fault, answer = self._outcome(call)
        wait_s = self.latency_s + (fault.seconds if isinstance(fault, Slow) else 0)
        if wait_s:
            self._stopping.wait(wait_s)
        body = b"<html>\xff" if isinstance(fault, Rubbish) else json.dumps(answer).encode()
        try:
            handler.send_response(fault.code if isinstance(fault, Status) else 200)
            if isinstance(fault, Status) and fault.retry_after is not None:
                handler.send_header("retry-after", fault.retry_after)
            handler.send_header("content-type", "application/json")
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2] if isinstance(fault, CutOff) else body)
            handler.close_connection = isinstance(fault, CutOff)
        except OSError:
            # The client did not wait for a slow answer.
            handler.close_connection = True


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            service._reply(self, Call(method=self.command, path=self.path, headers=headers, body=body))

    return Handler
