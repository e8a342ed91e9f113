"""Runs start at once where a warm worker listens, and a run whose process was killed does not stay STARTED."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from resources.run_launcher import LocalRunLauncher, Process

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

LOCATION = """
import time
from pathlib import Path

import dagster as dg

HERE = Path(__file__).parent


@dg.asset(pool="lake")
def held() -> None:
    (HERE / "began").touch()
    while not (HERE / "go_on").exists():
        time.sleep(0.02)


defs = dg.Definitions(
    assets=[held],
    jobs=[dg.define_asset_job("load", selection=[held], executor_def=dg.in_process_executor)],
)
"""

# Dagster starts anew for each of its commands, which on a full machine takes a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def wait(condition: Callable[[], bool], *, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.05)


class Platform:
    """A Dagster with the instance of this repository, in a folder of its own, and a job that a test holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[subprocess.Popen[bytes]] = []
        shutil.copy(ROOT / "dagster.yaml", folder)
        (folder / "held.py").write_text(LOCATION)
        (folder / "workspace.yaml").write_text("load_from: [{python_file: {relative_path: held.py}}]\n")

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as output:
            child = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "DAGSTER_HOME": str(self.folder), "PYTHONWARNINGS": "ignore"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.children.append(child)
        return child

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start_daemon(self) -> None:
        self.start("daemon", str(BIN / "dagster-daemon"), "run", "-w", "workspace.yaml")

    def start_worker(self) -> None:
        worker = self.start("worker", sys.executable, "-m", "resources.run_worker", "dagster")
        wait(lambda: "runs start from" in self.log("worker").read_text(), what="the worker")
        assert worker.poll() is None

    def launch(self) -> None:
        command = ["job", "launch", "-w", "workspace.yaml", "-j", "load"]
        assert self.start("launch", str(BIN / "dagster"), *command).wait() == 0, self.log("launch").read_text()

    def run(self) -> dg.DagsterRun:
        """The newest run, and only one by one: a test has at most two."""
        with dg.DagsterInstance.from_config(str(self.folder)) as instance:
            return instance.get_runs(limit=1)[0]

    def process(self) -> Process:
        with dg.DagsterInstance.from_config(str(self.folder)) as instance:
            launcher = instance.run_launcher
            assert isinstance(launcher, LocalRunLauncher)
            process = launcher.process_of(self.run().run_id)
            assert process is not None
            return process

    def wait_for(self, status: dg.DagsterRunStatus) -> None:
        wait(lambda: self.run().status == status, what=f"a run that is {status.value}")

    def held(self) -> bool:
        return (self.folder / "began").exists()

    def stop(self) -> None:
        for child in reversed(self.children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    # As for the services, what dagster.yaml says is seen from the folder that Dagster runs in.
    monkeypatch.chdir(tmp_path)
    made = Platform(tmp_path)
    yield made
    made.stop()


def test_a_load_that_was_killed_fails_and_the_next_one_gets_its_pool(platform: Platform) -> None:
    job = platform.start("job", str(BIN / "dagster"), "job", "execute", "-f", "held.py", "-j", "load")
    wait(platform.held, what="the step")
    job.kill()
    job.wait()
    assert platform.run().status == dg.DagsterRunStatus.STARTED
    killed = platform.run().run_id

    platform.start_worker()
    platform.start_daemon()
    platform.wait_for(dg.DagsterRunStatus.FAILURE)
    with dg.DagsterInstance.from_config(str(platform.folder)) as instance:
        said = [entry.message for entry in instance.all_logs(killed, of_type=dg.DagsterEventType.RUN_FAILURE)]
    assert any(f"process {job.pid} is gone" in message for message in said), said

    (platform.folder / "go_on").touch()
    platform.launch()
    platform.wait_for(dg.DagsterRunStatus.SUCCESS)
    assert platform.run().run_id != killed


def test_a_run_of_the_warm_worker_can_be_interrupted_and_killed_and_the_worker_goes_on(platform: Platform) -> None:
    platform.start_worker()
    platform.start_daemon()
    platform.launch()
    wait(platform.held, what="the step")
    worker = platform.children[0]
    process = platform.process()
    parent = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(parent) == worker.pid

    with dg.DagsterInstance.from_config(str(platform.folder)) as instance:
        assert instance.run_launcher.terminate(platform.run().run_id)
    platform.wait_for(dg.DagsterRunStatus.CANCELED)

    (platform.folder / "began").unlink()
    platform.launch()
    wait(platform.held, what="the step")
    os.kill(platform.process().pid, signal.SIGKILL)
    platform.wait_for(dg.DagsterRunStatus.FAILURE)
    assert worker.poll() is None


def test_a_number_that_a_later_process_was_given_is_not_the_run() -> None:
    assert Process(pid=os.getpid(), said_at=time.time()).is_alive
    assert not Process(pid=os.getpid(), said_at=time.time() - 365 * 86_400).is_alive
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", what="its end")
    assert not Process(pid=child.pid, said_at=time.time()).is_alive, "a zombie works no more"
    child.wait()
    assert not Process(pid=child.pid, said_at=time.time()).is_alive
