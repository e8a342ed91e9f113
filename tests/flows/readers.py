"""Readers of one small source as real processes: started, killed, frozen, and waited for."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from flows.chain import ROOT
from servers import forked
from servers.postgres import Database

from deltaworks import config as configuration
from deltaworks.config import Config
from deltaworks.log.local import LocalLogReader


def wait(condition: Callable[[], bool], *, what: str, timeout_s: float = 60.0) -> float:
    """Wait until it holds; how long that took."""
    began_at = time.monotonic()
    while not condition():
        assert time.monotonic() - began_at < timeout_s, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began_at


@dataclass
class Readers:
    """Capture services of one source with a table `t`, all with the same configuration unless told otherwise."""

    database: Database
    folder: Path
    settings: dict[str, object] = field(default_factory=dict)
    children: list[forked.Child] = field(default_factory=list)

    def config_path(self, home: str = "home") -> Path:
        """A configuration file whose state is in a folder of that name."""
        path = self.folder / f"{home}.yaml"
        source = {"kind": "postgres", "dsn": self.database.dsn, "tables": ["t"], "slot": self.database.name}
        source |= {"lease_s": 3.0, "publication": self.database.name, **self.settings}
        text = yaml.safe_dump({"home": home, "sources": {"shop": source}})
        if not path.exists() or path.read_text() != text:
            # A service may read it at this moment.
            beside = path.with_suffix(".new")
            beside.write_text(text)
            beside.replace(path)
        return path

    def config(self, home: str = "home") -> Config:
        """That configuration, read."""
        return configuration.load(self.config_path(home), environment={})

    def log(self, home: str = "home") -> LocalLogReader:
        """The log of the source."""
        return LocalLogReader(self.config(home).log_folder("shop"))

    def start(self, name: str, *, home: str = "home") -> forked.Child:
        """A capture service; what it says is in `<name>.log`."""
        child = forked.start(
            "capture",
            "shop",
            output=self.output(name),
            folder=ROOT,
            environment={"DELTAWORKS_CONFIG": str(self.config_path(home))},
        )
        self.children.append(child)
        return child

    def output(self, name: str) -> Path:
        """The file with what a service said."""
        return self.folder / f"{name}.log"

    def has_said(self, name: str, text: str) -> bool:
        """Whether a service has said so."""
        return text in self.output(name).read_text()

    def last_id(self, *, home: str = "home") -> int:
        """The largest id of an insert or read in the log."""
        ids = [0]
        for group in self.log(home).read(after_sequence=-1):
            for batch in group.batches:
                ids += [row["id"] for row in batch.rows.to_pylist() if row["_op"] in "cr"]
        return max(ids)

    def stop(self) -> None:
        """End every service that still runs."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for path in sorted(self.folder.glob("*.log")):
            print(f"--- {path.name}\n{path.read_text()}")  # noqa: T201  shown where the test failed
