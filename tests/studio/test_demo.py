"""The demo refuses what it cannot do, before it starts anything."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from studio.ready import PortTakenError, refuse_taken

ROOT = Path(__file__).resolve().parents[2]


def demo(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studio.demo"],
        cwd=ROOT,
        env={**os.environ, "DELTAWORKS_CONFIG": str(config), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_second_demo_names_the_first_and_touches_nothing(tmp_path: Path) -> None:
    config = tmp_path / "deltaworks.yaml"
    config.write_text((ROOT / "deltaworks.yaml").read_text())
    home = tmp_path / ".deltaworks"
    home.mkdir()
    with (home / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        done = demo(config)
    assert done.returncode == 1
    assert f"a demo is running in '{home}' as process {os.getpid()}" in done.stdout
    assert [path.name for path in home.iterdir() if path.name != "logs"] == ["demo.lock"]


def test_a_broken_configuration_is_one_message_with_all_faults(tmp_path: Path) -> None:
    config = tmp_path / "deltaworks.yaml"
    config.write_text("sources: {studio: {kind: oracle}}\nserve: {port: 0}\n")
    done = demo(config)
    assert done.returncode == 1
    for part in ("sources.studio.kind", "sources.studio.dsn", "serve.port"):
        assert part in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_every_port_in_use_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = {"one": first.getsockname()[1], "two": second.getsockname()[1]}
        with pytest.raises(PortTakenError, match=rf"{ports['one']} \(one\), {ports['two']} \(two\)"):
            refuse_taken(ports)
