"""Starts runs on this machine, and knows whether the process of a run is alive.

| a run starts …                 | in                                                       |
|--------------------------------|----------------------------------------------------------|
| where the warm worker listens  | a fork of it, at once (`resources.run_worker`)           |
| elsewhere                      | a new process of the code server, as Dagster does it     |
| by `dagster job execute`       | that command; only watched here                          |

Dagster's own launcher leaves a run STARTED for ever when its process was killed together with the
code server. Here Dagster's run monitoring asks for the process, fails the run, and frees its pools.
Daemon and runs are on one machine; on several, use the launcher of ECS or Kubernetes.
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, LaunchRunContext, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClassData, serialize_value

from resources.run_worker import ask

_STARTED_LATER_S = 5.0
"""A process that began this much after the run said its number is another one with the same number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The process that a run said it is executed by, and when it said so (seconds since 1970)."""

    pid: int
    said_at: float

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a number that the system gave to a later process does not count."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            # Somebody else's, so it is not a run of ours.
            return False
        try:
            # The name, in brackets, may hold anything; state and start (ticks after boot) follow the last bracket.
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except FileNotFoundError:
            # Ended just now, or a system without /proc, where the number is all there is.
            return not Path("/proc/self").exists()
        booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        started_at = booted_at + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return fields[0] != "Z" and started_at < self.said_at + _STARTED_LATER_S


class LocalRunLauncher(DefaultRunLauncher):
    """Dagster's launcher with a warm worker, where one listens, and with a look at a run's process."""

    def __init__(self, worker_socket: str, inst_data: ConfigurableClassData | None = None) -> None:
        """Take the place of the worker's socket, seen from the folder that Dagster runs in."""
        super().__init__(inst_data)
        self._worker_socket = Path(worker_socket)

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """What dagster.yaml says."""
        return {"worker_socket": dg.Field(str, description="Where `python -m resources.run_worker` listens.")}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Made from dagster.yaml."""
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the run in the worker; where none listens, in the code server."""
        run = context.dagster_run
        origin = context.job_code_origin
        pid = None
        if origin is not None:
            arguments = ExecuteRunArgs(job_origin=origin, run_id=run.run_id, instance_ref=self._instance.get_ref())
            pid = ask(self._worker_socket, serialize_value(arguments))
        if pid is None:
            super().launch_run(context)
        else:
            self._instance.report_engine_event(f"Started by the warm worker, as process {pid}.", run)

    def terminate(self, run_id: str) -> bool:
        """Interrupt the run's process; `False` where it has ended."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        process = self.process_of(run_id)
        if GRPC_INFO_TAG in run.tags or process is None:
            return bool(super().terminate(run_id))  # type: ignore[no-untyped-call]  # Dagster's own
        self._instance.report_run_canceling(run)
        if not process.is_alive:
            return False
        os.kill(process.pid, signal.SIGINT)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Run monitoring asks; see `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a started run is there."""
        process = self.process_of(run.run_id)
        if process is None:
            # It says its number as its first event; until then there is nothing to ask for.
            return CheckRunHealthResult(WorkerStatus.RUNNING, "it has not said its process yet")
        if process.is_alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=str(process.pid))
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"its process {process.pid} is gone; what it committed stays, start the run again"
        )

    def process_of(self, run_id: str) -> Process | None:
        """What the run said last: its events carry the number of their process."""
        entries = self._instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        for entry in reversed(entries):
            event = entry.dagster_event
            metadata = event.engine_event_data.metadata if event is not None else {}
            if "pid" in metadata:
                return Process(pid=int(json.loads(str(metadata["pid"].value))), said_at=entry.timestamp)
        return None
