"""A real OpenSearch of one node: the smallest distribution, from Maven, with 512 MB."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers.maven import FOLDER

from deltaworks.testing.postgres import free_port

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class OpenSearchServer:
    """A running server on 127.0.0.1."""

    port: int

    def new_name(self) -> str:
        """A name for an alias that no other test has."""
        return f"films_{next(_numbers)}"


@pytest.fixture(scope="session")
def opensearch_server() -> Iterator[OpenSearchServer]:
    """One server for the whole run."""
    [archive] = FOLDER.glob("opensearch-2*.zip")
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-opensearch-"))
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        [home] = folder.glob("opensearch-*")
        (home / "bin" / "opensearch").chmod(0o755)
        (home / "bin" / "opensearch-env").chmod(0o755)
        port = free_port()
        process = _start(folder, home, port)
        try:
            _wait(process, port, home)
            yield OpenSearchServer(port)
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, home: Path, port: int) -> subprocess.Popen[bytes]:
    settings = {
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        "transport.port": free_port(),
        # The disk of a test machine may be nearly full, which is no concern of these tests.
        "cluster.routing.allocation.disk.threshold_enabled": "false",
    }
    options = [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    java = Path(shutil.which("java") or "").resolve().parents[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "JAVA_HOME": str(java),
        "OPENSEARCH_TMPDIR": str(folder / "tmp"),
        "OPENSEARCH_JAVA_OPTS": "-Xms512m -Xmx512m -XX:TieredStopAtLevel=1",
    }
    (folder / "tmp").mkdir()
    account = {}
    if os.geteuid() == 0:
        # The server refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [str(home / "bin" / "opensearch"), *options],
            cwd=home,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            **account,  # type: ignore[call-overload]
        )


def _wait(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    deadline = time.monotonic() + 110
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_cluster/health?wait_for_status=yellow", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((home.parent / "out").read_text()[-3000:]) from None
            time.sleep(0.2)
