"""What `/metrics` says of the search page and of the index behind it."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.log.metrics import CaptureCollector
from deltaworks.log.status import CaptureStatus
from deltaworks.serve.status import Status


class Metrics:
    """The registry of one server. The index and the change log are looked at when a scrape asks, not before."""

    def __init__(self, app: str, status: Callable[[], Status], captured: Callable[[], CaptureStatus]) -> None:
        self.registry = CollectorRegistry()
        self.search_s = Histogram(
            "deltaworks_search_seconds",
            "Time of a search, without the network.",
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
        )
        self.registry.register(_IndexCollector(app, status))
        self.registry.register(CaptureCollector(lambda: [captured()]))


class _IndexCollector(Collector):
    def __init__(self, app: str, status: Callable[[], Status]) -> None:
        self._app = app
        self._status = status

    def collect(self) -> Iterable[GaugeMetricFamily]:
        status = self._status()
        for name, help_text, value in (
            ("deltaworks_index_ready", "1 when the index has had its first flush.", float(status.is_ready)),
            ("deltaworks_index_documents", "Documents that can be found.", status.document_count),
            ("deltaworks_index_lag_changes", "Changes in the log that are not in the index yet.", status.lag_changes),
            ("deltaworks_index_lag_seconds", "How long the oldest of them has been in the log.", status.lag_s),
            ("deltaworks_log_changes", "Changes appended to the log since its start.", status.log_changes),
        ):
            family = GaugeMetricFamily(name, help_text, labels=["app"])
            family.add_metric([self._app], value)
            yield family
