"""A shop on Kafka that a test owns, with the members of its app as real processes on this machine."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from flows.chain import ROOT, wait
from process.material import Feed
from process.shared_table import SharedTable
from servers import forked
from typer.testing import CliRunner, Result

from deltaworks import config as configuration
from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config
from deltaworks.process.shared.members import Member, read_members

ORDERS, SHARES = 12, 6


@dataclass
class Shop:
    """Start and end members, say what their step refuses, and ask what is dead. Every order is refused at first."""

    folder: Path
    brokers: str
    feed: Feed = field(init=False)
    members: dict[str, forked.Child] = field(default_factory=dict)

    @property
    def sink(self) -> SharedTable:
        return SharedTable(self.folder / "table.sqlite")

    def path(self, home: str = "home") -> Path:
        """The configuration file of a machine."""
        log = {"kind": "kafka", "brokers": self.brokers, "topics": f"shop.{self.folder.name}", "member_timeout_s": 6}
        log |= {"replication_factor": 1, "allow_weak_topics": True}
        source = {"kind": "postgres", "dsn": "none", "tables": ["purchase"], "log": log}
        settings = {"table": str(self.sink.file), "refused": str(self.folder / "refused.txt")}
        app = {"module": "flows.shared_orders:orders", "source": "shop", "shares": SHARES, "settings": settings}
        path = self.folder / f"{home}.yaml"
        values = {"home": str(self.folder / home), "sources": {"shop": source}, "apps": {"orders": app}}
        path.write_text(yaml.safe_dump(values))
        return path

    def config(self, home: str = "home") -> Config:
        return configuration.load(self.path(home), environment={})

    def refuse(self, *orders: int) -> None:
        (self.folder / "refused.txt").write_text(" ".join(map(str, orders)))

    def start(self, name: str) -> None:
        environment = {"DELTAWORKS_CONFIG": str(self.path())}
        output = self.folder / f"{name}.log"
        self.members[name] = forked.start("process", "orders", output=output, folder=ROOT, environment=environment)
        wait(lambda: "shares are taken" in output.read_text(), what=f"shares of {name}")

    def end(self, name: str, number: int) -> str:
        """Gives what the group calls it."""
        member = self.members.pop(name)
        member.send_signal(number)
        member.wait(60)
        return next(each.name for each in self.here() if each.name.endswith(f":{member.pid}"))

    def here(self) -> list[Member]:
        return read_members(self.config(), "orders")

    def letters(self) -> dict[int, str]:
        """Which order is dead with which member."""
        return {int(letter.key): str(letter.member) for letter in operate.dead_letters(self.config(), "orders")}

    def dead(self, *arguments: str, home: str = "home") -> Result:
        arguments = "dead", *arguments, "--config", str(self.path(home))
        return CliRunner(env={"COLUMNS": "200"}).invoke(command_line, arguments)


def letters_of_two(shop: Shop) -> None:
    """Start two members, each of which has dead letters: together all."""
    shop.start("a")
    shop.start("b")
    wait(lambda: len(set(shop.letters().values())) == 2 and len(shop.letters()) == ORDERS, what="letters of both")
