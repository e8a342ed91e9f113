"""A small studio that a test owns, and how to wait for it."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from servers import forked
from servers.postgres import Database

from deltaworks.change import READ
from deltaworks.config import Config
from deltaworks.log.registry import open_reader

ROOT = Path(__file__).resolve().parents[2]


def wait(condition: Callable[[], bool], *, what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.02)


@dataclass
class Studio:
    """A small studio that a test owns: change its database, run its services, kill them."""

    database: Database
    config_path: Path
    config: Config
    talent_port: int
    children: list[subprocess.Popen[bytes] | forked.Child] = field(default_factory=list)

    def start(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        """A child process whose output goes to a file beside the configuration."""
        output = (self.config_path.parent / f"{log}.log").open("ab")
        with output:
            child = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "DELTAWORKS_CONFIG": str(self.config_path), "STUDIO_DSN": self.database.dsn},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.children.append(child)
        return child

    def deltaworks(self, *command: str) -> forked.Child:
        """A `deltaworks` command as a child process."""
        child = forked.start(
            *command,
            output=self.config_path.parent / f"{'-'.join(command)}.log",
            folder=ROOT,
            environment={"DELTAWORKS_CONFIG": str(self.config_path), "STUDIO_DSN": self.database.dsn},
        )
        self.children.append(child)
        return child

    def start_talent(self) -> subprocess.Popen[bytes]:
        child = self.start("studio.talent", "--port", str(self.talent_port), log="talent")

        def answers() -> bool:
            assert child.poll() is None, (self.config_path.parent / "talent.log").read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{self.talent_port}/health", timeout=2).is_success
            except httpx.TransportError:
                return False

        wait(answers, what="the Talent Service")
        return child

    def stop(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def streamed_identities(studio: Studio) -> Counter[tuple[str, int, int]]:
    """How often each streamed change is in the log."""
    seen: Counter[tuple[str, int, int]] = Counter()
    for group in open_reader(studio.config, "studio").read(after_sequence=-1):
        for batch in group.batches:
            columns = [batch.rows.column(name).to_pylist() for name in ("_op", "_commit", "_ordinal")]
            seen.update(
                (str(batch.schema.name), commit, ordinal)
                for op, commit, ordinal in zip(*columns, strict=True)
                if op != READ
            )
    return seen
