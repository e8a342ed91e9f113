"""Fixtures: a real HTTP server that speaks S3, and one that forgets who was first as many look-alikes do."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest

from deltaworks.config import S3Config

Environ = dict[str, Any]
Respond = Callable[..., Any]
Application = Callable[[Environ, Respond], Iterable[bytes]]

KEY_ID, SECRET_KEY = "the-key-id", "the-secret-key"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of its own for one test."""

    endpoint: str
    name: str

    @property
    def address(self) -> str:
        return f"s3://{self.name}/lake"

    @property
    def config(self) -> S3Config:
        return S3Config.model_validate(
            {"endpoint": self.endpoint, "access_key_id": KEY_ID, "secret_access_key": SECRET_KEY}
        )

    def client(self) -> Any:
        import boto3  # noqa: PLC0415  half a second that other tests need not spend

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET_KEY,
        )

    def objects(self) -> list[str]:
        """The names of all objects."""
        client = self.client()
        try:
            return [item["Key"] for item in client.list_objects_v2(Bucket=self.name).get("Contents", [])]
        finally:
            client.close()


@contextmanager
def s3_server(change: Callable[[Application], Application] = lambda app: app) -> Iterator[str]:
    """Serve S3 on a free port; `change` may put something in front of it. Gives the endpoint."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415  two seconds
    from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: PLC0415

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None:
            """Keep pytest's output to the tests."""

    application = change(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def forgetting_who_was_first(application: Application) -> Application:
    """A store that takes If-None-Match and does nothing with it."""

    def answer(environ: Environ, respond: Respond) -> Iterable[bytes]:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return application(environ, respond)

    return answer


def answering(status: str, code: str) -> Callable[[Application], Application]:
    """A store that answers every write with one error."""

    def change(application: Application) -> Application:
        def answer(environ: Environ, respond: Respond) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != "PUT" or environ["PATH_INFO"].count("/") < 2:
                return application(environ, respond)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            respond(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]

        return answer

    return change


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The endpoint of a store that keeps its promises."""
    with s3_server() as endpoint:
        yield endpoint


def new_bucket(endpoint: str, name: str) -> Bucket:
    bucket = Bucket(endpoint, name)
    client = bucket.client()
    client.create_bucket(Bucket=name)
    client.close()
    return bucket


@pytest.fixture
def bucket(object_store: str, request: pytest.FixtureRequest) -> Bucket:
    return new_bucket(object_store, f"bucket-{abs(hash(request.node.nodeid))}")
