"""A real Apache Kafka of one broker, from Maven, behind a gate that can shut it off."""

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers.gate import Gate
from servers.maven import FOLDER

from deltaworks.testing.postgres import free_port

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class KafkaBroker:
    """A running broker; clients reach it by the gate only, which is the address that it gives them."""

    gate: Gate

    @property
    def servers(self) -> str:
        return f"127.0.0.1:{self.gate.port}"

    def connection(self) -> dict[str, Any]:
        """The settings of `connections:`."""
        return {"kind": "kafka", "servers": self.servers, "timeout_s": 3, "options": {"client.id": "the-secret"}}

    def new_topic(self) -> str:
        """A name that no other test has."""
        return f"films-{next(_numbers)}"


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[KafkaBroker]:
    """One broker for the whole run."""
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-kafka-"))
    port, controller = free_port(), free_port()
    gate = Gate(port)
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{gate.port}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": folder / "data",
        "offsets.topic.replication.factor": 1,
        "default.replication.factor": 1,
        "num.partitions": 2,
        "auto.create.topics.enable": "false",
    }
    file = folder / "server.properties"
    file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    java = ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{FOLDER / 'kafka-4.1.1'}/*"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    format_ = [*java, "kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", str(file)]
    subprocess.run(format_, check=True, capture_output=True, env=environment)
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            [*java, "kafka.Kafka", str(file)], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
    try:
        broker = KafkaBroker(gate)
        _wait(broker, process, folder / "out")
        yield broker
    finally:
        process.kill()
        process.wait(30)
        gate.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(broker: KafkaBroker, process: subprocess.Popen[bytes], out: Path) -> None:
    import confluent_kafka  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient  # noqa: PLC0415

    client = AdminClient({"bootstrap.servers": broker.servers, "log_level": 0})
    deadline = time.monotonic() + 60
    while True:
        try:
            client.list_topics(timeout=1)
            return
        except confluent_kafka.KafkaException:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(out.read_text()[-3000:]) from None
