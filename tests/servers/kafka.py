"""Fixtures: Apache Kafka (KRaft) on loopback, one broker or three, each broker a controller too."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers.maven import FOLDER

from deltaworks.config import KafkaLogConfig

LIBRARIES = FOLDER / "kafka-4.1.1"

HEAP = "-Xmx320m"

LOGGING = """
<Configuration status="WARN">
  <Appenders><Console name="out"><PatternLayout pattern="%d %p %m (%c)%n"/></Console></Appenders>
  <Loggers><Root level="WARN"><AppenderRef ref="out"/></Root></Loggers>
</Configuration>
"""


def java(*arguments: str) -> list[str]:
    """The command line that runs one of Kafka's classes."""
    if not any(LIBRARIES.glob("kafka_2.13-*.jar")):
        raise RuntimeError(f"no Kafka in {str(LIBRARIES)!r}; run tests/servers/install.sh")
    return ["java", HEAP, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{LIBRARIES}/*", *arguments]


class KafkaCluster:
    """Brokers that a test may kill and start again."""

    def __init__(self, folder: Path, *, brokers: int) -> None:
        self.folder = folder
        self._id = uuid.uuid4().hex[:22]
        self._ports = [(_free_port(), _free_port()) for _ in range(brokers)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        (folder / "log4j2.xml").write_text(LOGGING)
        for number in range(brokers):
            self._format(number)

    @property
    def brokers(self) -> str:
        """What clients connect to."""
        return ",".join(f"127.0.0.1:{port}" for port, _ in self._ports)

    @property
    def count(self) -> int:
        return len(self._ports)

    def log_settings(self, **settings: Any) -> KafkaLogConfig:
        """A log here; as weak as the cluster is small."""
        small = {} if self.count >= 3 else {"allow_weak_topics": True, "replication_factor": 1}
        return KafkaLogConfig.model_validate({"kind": "kafka", "brokers": self.brokers, **small, **settings})

    def start(self, *numbers: int) -> None:
        """Start brokers (all when none is named); does not wait."""
        for number in numbers or range(self.count):
            with (self.folder / f"broker{number}.log").open("ab") as out:
                self._processes[number] = subprocess.Popen(
                    java(
                        f"-Dlog4j2.configurationFile={self.folder / 'log4j2.xml'}",
                        "kafka.Kafka",
                        str(self._settings(number)),
                    ),
                    stdout=out,
                    stderr=out,
                )

    def wait(self, *, timeout_s: float = 90.0) -> None:
        """Wait until every broker is there."""
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        admin = AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if len(admin.list_topics(timeout=2.0).brokers) == self.count:
                    return
            except Exception:
                pass
            if time.monotonic() > deadline:
                tails = [(self.folder / f"broker{n}.log").read_text()[-2_000:] for n in range(self.count)]
                raise TimeoutError("brokers do not answer:\n" + "\n".join(tails))
            time.sleep(0.2)

    def kill(self, number: int) -> None:
        """kill -9: nothing is flushed or handed over."""
        process = self._processes.pop(number)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End all of them."""
        for number in list(self._processes):
            self.kill(number)

    def _settings(self, number: int) -> Path:
        return self.folder / f"broker{number}.properties"

    def _format(self, number: int) -> None:
        port, controller = self._ports[number]
        voters = ",".join(f"{n}@127.0.0.1:{quorum}" for n, (_, quorum) in enumerate(self._ports))
        copies = min(3, self.count)
        self._settings(number).write_text(
            f"""process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={self.folder / f"data{number}"}
offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={max(1, copies - 1)}
transaction.state.log.num.partitions=4
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=8000000
broker.session.timeout.ms=6000
broker.heartbeat.interval.ms=1000
replica.lag.time.max.ms=5000
unclean.leader.election.enable=false
"""
        )
        subprocess.run(
            java(
                f"-Dlog4j2.configurationFile={self.folder / 'log4j2.xml'}",
                "kafka.tools.StorageTool",
                *("format", "-t", self._id, "-c", str(self._settings(number))),
            ),
            check=True,
            capture_output=True,
        )


@pytest.fixture(scope="session")
def small_kafka() -> Iterator[KafkaCluster]:
    """One broker for the whole run; every test has topics of its own."""
    yield from _cluster(1)


@pytest.fixture(scope="module")
def kafka_cluster() -> Iterator[KafkaCluster]:
    """Three brokers for tests that kill them."""
    yield from _cluster(3)


def _cluster(brokers: int) -> Iterator[KafkaCluster]:
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-kafka-"))
    cluster = KafkaCluster(folder, brokers=brokers)
    try:
        cluster.start()
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
