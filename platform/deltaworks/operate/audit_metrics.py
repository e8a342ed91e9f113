"""What audits found, as Prometheus metrics: read from what they keep when a scrape asks, so it costs no audit."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaworks.config import Config
from deltaworks.operate.audit_mark import unaudited
from deltaworks.operate.incident import Incidents


class AuditCollector(Collector):
    """The incidents of one source, and how much of its log no audit has seen."""

    def __init__(self, config: Config, source: str) -> None:
        self._config = config
        self._source = source

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All of them, as of now."""
        incidents = Incidents.of(self._config, self._source).open()
        values = (
            len(incidents),
            sum(incident.loss.count for incident in incidents),
            unaudited(self._config, self._source),
        )
        for family, value in zip(audit_metrics(), values, strict=True):
            family.add_metric([self._source], value)
            yield family

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Without reading anything."""
        return audit_metrics()


def audit_metrics() -> list[GaugeMetricFamily]:
    """The metrics without a sample."""
    return [
        GaugeMetricFamily(name, text, labels=["source"])
        for name, text in (
            ("deltaworks_audit_open_incidents", "Losses that audits found and that are not repaired."),
            ("deltaworks_audit_lost_changes", "Changes that are missing or too many at a hop by these, at the least."),
            ("deltaworks_audit_unseen_changes", "Changes of the log that no audit has compared yet."),
        )
    ]
