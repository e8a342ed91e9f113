"""The status of capture as Prometheus metrics: looked at when a scrape asks, not before."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deltaworks.capture.status import SlotStatus
from deltaworks.log.archive.standing import ArchiveStatus
from deltaworks.log.status import CaptureStatus, TableDumpStatus, TableStatus


@dataclass(frozen=True, slots=True)
class CaptureMetric:
    """One metric of a source; no sample while its value is not known."""

    name: str
    help: str
    value: Callable[[CaptureStatus], float | None]
    is_counter: bool = False


@dataclass(frozen=True, slots=True)
class TableMetric:
    """One metric of each captured table."""

    name: str
    help: str
    value: Callable[[TableStatus], float | None]


def _is_asked(status: CaptureStatus) -> bool:
    return status.source_position is not None or status.unreachable is not None


def _of_slot(value: Callable[[SlotStatus], float | None]) -> Callable[[CaptureStatus], float | None]:
    return lambda status: None if status.slot is None else value(status.slot)


def _of_archive(value: Callable[[ArchiveStatus], float | None]) -> Callable[[CaptureStatus], float | None]:
    return lambda status: None if status.archive is None else value(status.archive)


def _of_dump(value: Callable[[TableDumpStatus], float | None]) -> Callable[[TableStatus], float | None]:
    return lambda status: None if status.dump is None else value(status.dump)


CAPTURE_METRICS = (
    CaptureMetric(
        "deltaworks_capture_up",
        "1 when the source answers.",
        lambda status: float(status.unreachable is None) if _is_asked(status) else None,
    ),
    CaptureMetric(
        "deltaworks_capture_service",
        "1 when a process holds the change log to write it.",
        lambda status: float(status.service is not None),
    ),
    CaptureMetric(
        "deltaworks_capture_gaps",
        "Gaps that are open: changes that were missed and whose tables are not dumped again yet.",
        lambda status: len(status.gaps),
    ),
    CaptureMetric(
        "deltaworks_capture_changes_total",
        "Changes appended to the change log since its start, reads of dumps included.",
        lambda status: status.changes,
        is_counter=True,
    ),
    CaptureMetric(
        "deltaworks_capture_transactions_total",
        "Transactions with changes of captured tables since the log's start.",
        lambda status: status.transactions,
        is_counter=True,
    ),
    CaptureMetric(
        "deltaworks_capture_changes_per_second",
        "Changes appended per second over the last minute.",
        lambda status: status.changes_per_s,
    ),
    CaptureMetric(
        "deltaworks_capture_position_bytes",
        "The position the change log has reached, as a number of bytes.",
        lambda status: status.position.value,
    ),
    CaptureMetric(
        "deltaworks_capture_lag_bytes",
        "Bytes of the source's own log that are not captured yet, those of other tables and databases included.",
        lambda status: status.lag_bytes,
    ),
    CaptureMetric(
        "deltaworks_capture_lag_seconds",
        "Nothing that was committed longer ago than this is missing in the change log.",
        lambda status: status.lag_s,
    ),
    CaptureMetric(
        "deltaworks_capture_committed_timestamp_seconds",
        "Commit time of the newest captured change, by the source's clock.",
        lambda status: None if status.committed_at is None else status.committed_at.timestamp(),
    ),
    CaptureMetric(
        "deltaworks_capture_slot_active",
        "1 when somebody reads the replication slot; 0 when nobody does, or there is none.",
        lambda status: (
            None if status.source_position is None else float(status.slot is not None and status.slot.is_active)
        ),
    ),
    CaptureMetric(
        "deltaworks_capture_slot_lost",
        "1 when the server gave up what the slot kept: changes are missed.",
        _of_slot(lambda slot: float(slot.wal_status == "lost" or slot.invalidation is not None)),
    ),
    CaptureMetric(
        "deltaworks_capture_slot_kept_bytes",
        "Bytes of WAL that the server keeps for the slot.",
        _of_slot(lambda slot: slot.kept_bytes),
    ),
    CaptureMetric(
        "deltaworks_capture_slot_safe_bytes",
        "Bytes that may be written before the slot is in danger; none where max_slot_wal_keep_size is unlimited.",
        _of_slot(lambda slot: slot.safe_bytes),
    ),
    CaptureMetric(
        "deltaworks_capture_slot_unconfirmed_bytes",
        "Bytes of WAL that were written after what capture confirmed.",
        _of_slot(lambda slot: slot.unconfirmed_bytes),
    ),
    CaptureMetric(
        "deltaworks_capture_canary_age_seconds",
        "How long ago the newest canary was written that came through into the log; it grows while nothing does.",
        lambda status: None if status.canary is None else status.canary.age_s,
    ),
    CaptureMetric(
        "deltaworks_capture_canary_seconds",
        "How long the newest canary took from the source into the change log.",
        lambda status: None if status.canary is None else status.canary.took_s,
    ),
    CaptureMetric(
        "deltaworks_capture_canary_overdue",
        "1 when a service runs and its canaries do not come through.",
        lambda status: None if status.canary is None else float(status.canary.is_overdue),
    ),
    CaptureMetric(
        "deltaworks_capture_log_full",
        "1 while the disk of the change log has no room: nothing is lost, the source keeps what it has.",
        lambda status: float(status.is_full),
    ),
    CaptureMetric(
        "deltaworks_archive_up",
        "1 while segments go to the archive; 0 since the last try failed, none for a log without an archive.",
        _of_archive(lambda archive: float(archive.fault is None)),
    ),
    CaptureMetric(
        "deltaworks_archive_behind_segments",
        "Closed segments of the change log that are not in its archive yet; retention does not remove them.",
        _of_archive(lambda archive: archive.behind_segments),
    ),
    CaptureMetric(
        "deltaworks_archive_behind_bytes",
        "Bytes of these segments.",
        _of_archive(lambda archive: archive.behind_bytes),
    ),
    CaptureMetric(
        "deltaworks_archive_bytes",
        "Bytes of all segments in the archive.",
        _of_archive(lambda archive: archive.bytes),
    ),
)
"""Metrics of a source, labelled `source`."""

TABLE_METRICS = (
    TableMetric(
        "deltaworks_capture_table_changes_per_second",
        "Changes of the table appended per second over the last minute.",
        lambda table: table.changes_per_s,
    ),
    TableMetric(
        "deltaworks_capture_table_committed_timestamp_seconds",
        "Commit time of the newest group of changes with the table in it.",
        lambda table: None if table.committed_at is None else table.committed_at.timestamp(),
    ),
    TableMetric(
        "deltaworks_capture_dump_done",
        "1 when every row that was there at its start is captured.",
        _of_dump(lambda dump: float(dump.state == "done")),
    ),
    TableMetric(
        "deltaworks_capture_dump_rows",
        "Rows that the dump under way, or the first one, gave out.",
        _of_dump(lambda dump: dump.rows),
    ),
    TableMetric(
        "deltaworks_capture_dump_estimated_rows",
        "Rows of the table by the source's statistics.",
        _of_dump(lambda dump: dump.estimated_rows),
    ),
    TableMetric(
        "deltaworks_capture_dump_eta_seconds",
        "How long the dump will take at the last minute's pace; 0 when it is done.",
        _of_dump(lambda dump: dump.eta_s),
    ),
)
"""Metrics of a table, labelled `source` and `table`."""


class CaptureCollector(Collector):
    """Gives the metrics of what `statuses` returns at each scrape. As thread-safe as `statuses` is."""

    def __init__(self, statuses: Callable[[], Iterable[CaptureStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        """All metrics; a family without a known value is left out."""
        statuses = list(self._statuses())
        for metric in CAPTURE_METRICS:
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=["source"])
            for status in statuses:
                if (value := metric.value(status)) is not None:
                    family.add_metric([status.source], value)
            yield family
        for each in TABLE_METRICS:
            gauge = GaugeMetricFamily(each.name, each.help, labels=["source", "table"])
            for status in statuses:
                for table in status.tables:
                    if (value := each.value(table)) is not None:
                        gauge.add_metric([status.source, table.table], value)
            yield gauge

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks no source."""
        return []
