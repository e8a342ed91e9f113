"""Gives a source's metrics to Prometheus, beside the service that captures it."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.metrics import CaptureCollector
from deltaworks.operate.sources import capture_status

HOST = "127.0.0.1"
"""Metrics name tables, so they are for this machine; who scrapes from elsewhere puts a proxy before it."""


class MetricsPortInUseError(TerminalError):
    """Another process listens on the port for metrics."""


@contextmanager
def metrics_server(config: Config, source: str, *, port: int | None = None) -> Iterator[int | None]:
    """Serve `/metrics` of a source in a thread while inside; the port, or `None` when none is configured.

    `port` wins over `sources.*.metrics_port`. A scrape reads the log's newest headers and asks the source one
    short question; with nobody scraping it costs nothing.

    Raises:
        MetricsPortInUseError: somebody else listens there.
    """
    port = port or config.source(source).metrics_port
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(CaptureCollector(lambda: [capture_status(config, source)]))
    try:
        server, thread = start_http_server(port, addr=HOST, registry=registry)
    except OSError as error:
        raise MetricsPortInUseError(
            f"cannot give metrics of source {source!r}: port {port} of {HOST} is in use; "
            f"change sources.{source}.metrics_port, or stop what listens there"
        ) from error
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
