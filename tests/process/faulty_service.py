"""A real HTTP service with faults, for the enrichments under test."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyService:
    """An HTTP service that knows names by number, and fails as it is told to.

    `fault` says for the ids of a request what to answer: `None` for the truth, a status, or a word. Past the first
    `limit` ids of a request it knows nobody.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.fault: Callable[[list[int]], int | str | None] = lambda ids: None
        self.retry_after: str | None = None
        self.limit: int | None = None
        self.requests: list[list[int]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                ids = json.loads(self.rfile.read(int(self.headers["content-length"])))["ids"]
                service.requests.append(ids)
                service._answer(self, ids)

            def log_message(self, *args: Any) -> None:
                pass

        self.handler = Handler
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        """Refuse connections from now on; a second call does nothing."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
        self.server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, ids: list[int]) -> None:
        fault = self.fault(ids)
        body = json.dumps({str(id_): self.names[id_] for id_ in ids[: self.limit] if id_ in self.names}).encode()
        match fault:
            case int():
                handler.send_response(fault)
                if self.retry_after is not None:
                    handler.send_header("retry-after", self.retry_after)
                body = b"{}"
            case "slow":
                time.sleep(0.4)
                handler.send_response(200)
            case "garbage":
                handler.send_response(200)
                body = b"<html>\xff"
            case "partial":
                handler.send_response(200)
                handler.send_header("content-length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body[: len(body) // 2])
                handler.close_connection = True
                return
            case _:
                handler.send_response(200)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        try:
            handler.wfile.write(body)
        except BrokenPipeError:
            # The client did not wait for the slow answer.
            handler.close_connection = True
