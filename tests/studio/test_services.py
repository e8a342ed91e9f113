"""Children of the demo: what ends early is told with its last words, and all of them are stopped at the end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio import services
from studio.services import ServiceFailedError, Services

WAITS = "import signal, time; print('ready', flush=True); signal.sigwait([signal.SIGTERM]); print('bye', flush=True)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_ready(children: Services, name: str) -> bool:
    return "ready" in children.output(name).read_text()


def test_children_end_politely_and_the_first_one_ends_last(tmp_path: Path) -> None:
    code = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); {WAITS}; import time; "
    code += "print(time.monotonic())"
    with Services(tmp_path, environment={}) as children:
        for name in ("first", "second", "third"):
            children.start(name, python(code))
            children.wait(name, until=lambda name=name: is_ready(children, name), timeout_s=30)  # type: ignore[misc]
        children.refuse_ended()
    ends = {name: float((tmp_path / f"{name}.log").read_text().split()[-1]) for name in ("first", "second", "third")}
    assert ends["first"] > max(ends["second"], ends["third"])


def test_a_child_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    with Services(tmp_path, environment={}) as children:
        children.start("talent", python("print('the port is taken'); raise SystemExit(3)"))
        with pytest.raises(ServiceFailedError, match=r"'talent' ended with code 3:\n.*the port is taken"):
            children.wait("talent", until=lambda: False, timeout_s=30)
        with pytest.raises(ServiceFailedError, match="'talent' ended with code 3"):
            children.refuse_ended()


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "STOP_WAIT_S", 0.2)
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('ready', child.pid, flush=True); child.wait()"
    )
    with Services(tmp_path, environment={}) as children:
        children.start("deaf", python(code))
        children.wait("deaf", until=lambda: is_ready(children, "deaf"), timeout_s=30)
        grandchild = int(children.output("deaf").read_text().split()[1])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(grandchild):
        time.sleep(0.02)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    """Whether it works; who inherits a killed process may leave it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state) and "Z" not in state
