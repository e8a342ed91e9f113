"""Gives metrics to Prometheus, beside the service that captures a source or runs an app."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from deltaworks.config import Config
from deltaworks.errors import TerminalError
from deltaworks.log.metrics import CaptureCollector
from deltaworks.operate.audit_metrics import AuditCollector
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
    registry = CollectorRegistry()
    registry.register(CaptureCollector(lambda: [capture_status(config, source)]))
    registry.register(AuditCollector(config, source))
    with _serving(port, registry, what=f"source {source!r}", setting=f"sources.{source}.metrics_port") as served:
        yield served


@contextmanager
def app_metrics_server(config: Config, app: str, *, port: int | None = None) -> Iterator[int | None]:
    """Serve `/metrics` of this process, which runs the app, while inside; the port, or `None` when none is configured.

    `port` wins over `apps.*.metrics_port`. Steps count as they go; keys that wait and dead letters are counted when a
    scrape asks.

    Raises:
        MetricsPortInUseError: somebody else listens there.
    """
    from deltaworks.operate.freshness import AgeCollector  # noqa: PLC0415 - capture has no use for it
    from deltaworks.process.standing import StandingCollector  # noqa: PLC0415

    port = port or config.app(app).metrics_port
    is_shared = config.app(app).shares is not None
    collectors = [StandingCollector(app, config.app_folder(app), is_shared=is_shared), AgeCollector(config, app)]
    for collector in collectors if port is not None else ():
        REGISTRY.register(collector)
    try:
        with _serving(port, REGISTRY, what=f"app {app!r}", setting=f"apps.{app}.metrics_port") as served:
            yield served
    finally:
        for collector in collectors if port is not None else ():
            REGISTRY.unregister(collector)


@contextmanager
def _serving(port: int | None, registry: CollectorRegistry, *, what: str, setting: str) -> Iterator[int | None]:
    if port is None:
        yield None
        return
    try:
        server, thread = start_http_server(port, addr=HOST, registry=registry)
    except OSError as error:
        raise MetricsPortInUseError(
            f"cannot give metrics of {what}: port {port} of {HOST} is in use; "
            f"change {setting}, or stop what listens there"
        ) from error
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
