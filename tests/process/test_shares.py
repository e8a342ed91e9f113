"""Members of one app on real Kafka: they join, leave, are killed, and are frozen past their session."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient
from process.faulty_service import FaultyService
from process.film_app import FILM, PERSON, ROLE
from process.material import Feed, create, delete, update
from process.member_child import SHARES, config_of
from process.shared_table import SharedTable
from servers.kafka import KafkaCluster

from deltaworks.log.canary import Canary
from deltaworks.log.change_log import Group
from deltaworks.log.registry import log_of
from deltaworks.operate.freshness import AgeCollector, AppFreshness, MemberFreshness, app_freshness
from deltaworks.position import Lsn

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(400)]

CHILD = Path(__file__).with_name("member_child.py")
FILMS, PEOPLE = 40, 6
_numbers = itertools.count(1)


@dataclass
class World:
    """A source of films on Kafka, what its app should have made of it, and the members that run the app."""

    feed: Feed
    sink: SharedTable
    service: FaultyService
    folder: Path
    forks: subprocess.Popen[str]
    topics: str
    films: dict[int, str] = field(default_factory=dict)
    roles: dict[int, tuple[int, int]] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """A member joins."""
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        self.forks.stdin.write(f"{name}\n")
        self.forks.stdin.flush()
        said, pid = self.forks.stdout.readline().split()
        assert said == name
        self.members[name] = int(pid)

    def signal(self, name: str, number: int) -> None:
        """Freeze or wake a member."""
        os.kill(self.members[name], number)

    def end(self, name: str, number: int) -> None:
        """Let a member leave (SIGTERM) or die (SIGKILL), and wait until it is gone."""
        pid = self.members.pop(name)
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, number)
        self.wait(lambda: not Path(f"/proc/{pid}").exists(), what=f"the end of {name}")

    def change(self, chance: random.Random, times: int = 1) -> None:
        """Random changes: of films, of who plays in them and in which film a role is, and of what people are called."""
        for _ in range(times):
            film = chance.randrange(FILMS)
            match chance.randrange(6):
                case 0 if film in self.films:
                    del self.films[film]
                    self.feed.commit(delete(FILM, film_id=film))
                case 1:
                    person = chance.randrange(1, PEOPLE)
                    self.service.names[person] = f"name {chance.random()}"
                    self.feed.commit(update(PERSON, person_id=person, name=self.service.names[person]))
                case 2:
                    role = chance.randrange(FILMS)
                    change = update if role in self.roles else create
                    # Often into another film: both films have to be made anew, whoever has them.
                    self.roles[role] = film, chance.randrange(1, PEOPLE)
                    self.feed.commit(change(ROLE, role_id=role, film_id=film, person_id=self.roles[role][1]))
                case _:
                    change = update if film in self.films else create
                    self.films[film] = f"title {chance.random()}"
                    self.feed.commit(change(FILM, film_id=film, title=self.films[film], status="released"))

    def expected(self) -> dict[int, dict[str, object]]:
        """The reference: every film as it is, with the names of its people by role."""
        return {
            film: {
                "title": title,
                "cast": list(
                    dict.fromkeys(
                        self.service.names[person] for _, (of, person) in sorted(self.roles.items()) if of == film
                    )
                ),
            }
            for film, title in self.films.items()
        }

    def settle(self, *, timeout_s: float = 60.0) -> None:
        """Wait until the sink is as the reference says."""
        self.wait(
            lambda: self.sink.bodies() == self.expected(),
            what="the reference fold in the sink",
            tells=self.difference,
            timeout_s=timeout_s,
        )

    def difference(self) -> str:
        """What the sink has otherwise, and what the members said."""
        expected, found = self.expected(), self.sink.bodies()
        odd = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        said = "\n".join(f"{path.name}: {path.read_text()[-1_500:]}" for path in sorted(self.folder.glob("*.out")))
        first = [(key, expected.get(key), found.get(key), self.sink.documents().get(key)) for key in odd[:3]]
        return f"{len(odd)} keys differ: {first}\n{said}"

    def wait_written_by(self, name: str, chance: random.Random) -> None:
        """Go on with changes until a member has written one."""
        before = self.sink.written_by(name)

        def has_written() -> bool:
            self.change(chance)
            return self.sink.written_by(name) > before

        self.wait(has_written, what=f"a document of {name}", tells=self.difference)

    @staticmethod
    def wait(
        condition: Callable[[], bool], *, what: str, timeout_s: float = 60.0, tells: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}\n{tells()}"
            time.sleep(0.05)


@pytest.fixture
def world(kafka_cluster: KafkaCluster, tmp_path: Path, service: FaultyService) -> Iterator[World]:
    topics, sink = f"shares{next(_numbers)}", SharedTable(tmp_path / "sink.sqlite")
    service.names = {number: f"person {number}" for number in range(1, PEOPLE)}
    sink.open(app="films", key="film_id", config=None).close()  # type: ignore[arg-type]
    config = config_of(kafka_cluster.brokers, topics, tmp_path / "writer", service.url)
    command = [sys.executable, str(CHILD), kafka_cluster.brokers, topics, str(tmp_path), str(sink.file), service.url]
    with (
        log_of(config, "studio").writer() as writer,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks,
    ):
        made = World(Feed(writer), sink, service, tmp_path, forks, topics)
        for role in range(FILMS):
            made.roles[role] = role, role % (PEOPLE - 1) + 1
        made.feed.commit(*(create(ROLE, role_id=role, film_id=f, person_id=p) for role, (f, p) in made.roles.items()))
        try:
            yield made
        finally:
            for pid in made.members.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert forks.stdin is not None
            forks.stdin.close()


def test_members_join_leave_and_are_killed(world: World) -> None:
    chance = random.Random(3)
    world.change(chance, 60)
    world.start("a")
    world.settle()
    world.start("b")
    world.wait_written_by("b", chance)
    world.start("c")
    world.wait_written_by("c", chance)
    world.settle()
    world.end("b", signal.SIGTERM)
    world.change(chance, 40)
    world.settle()
    world.end("a", signal.SIGKILL)
    world.change(chance, 40)
    world.settle()
    world.end("c", signal.SIGKILL)
    world.change(chance, 20)
    world.start("d")
    world.settle()
    # A member that takes a share has folded at least as far as whoever had it, so nothing older was ever sent.
    assert world.sink.stale() == 0


def test_a_member_frozen_past_its_session_wakes_up_and_does_no_harm(world: World) -> None:
    chance = random.Random(4)
    world.change(chance, 60)
    world.start("a")
    world.start("b")
    for name in ("a", "b"):
        world.wait_written_by(name, chance)
    world.signal("a", signal.SIGSTOP)
    world.change(chance, 40)
    # All of it is done without the frozen one: its session has ended, and the other has its shares.
    world.settle()
    world.change(chance, 40)
    world.signal("a", signal.SIGCONT)
    world.settle()
    world.wait_written_by("a", chance)
    world.settle()


@pytest.mark.parametrize("seed", [1])
def test_random_rescales_end_at_the_reference_fold(world: World, seed: int) -> None:
    chance = random.Random(seed)
    names = (f"m{number}" for number in itertools.count(1))
    frozen: set[str] = set()
    world.start(next(names))
    for _ in range(12):
        world.change(chance, chance.randrange(5, 30))
        running = sorted(world.members)
        match chance.choice(("join", "leave", "kill", "freeze", "wake", "work")):
            case "join" if len(running) < 4:
                world.start(next(names))
            case "leave" if len(running) > 1:
                name = chance.choice(running)
                frozen.discard(name)
                world.end(name, signal.SIGTERM)
            case "kill" if running:
                name = chance.choice(running)
                frozen.discard(name)
                world.end(name, signal.SIGKILL)
            case "freeze" if running:
                frozen.add(chance.choice(running))
                for name in frozen:
                    world.signal(name, signal.SIGSTOP)
            case "wake":
                for name in frozen:
                    world.signal(name, signal.SIGCONT)
                frozen.clear()
            case _:
                pass
        until = time.monotonic() + chance.uniform(0.0, 2.0)
        while time.monotonic() < until:
            world.change(chance)
    if not set(world.members) - frozen:
        world.start(next(names))
    world.settle()
    for name in frozen:
        world.signal(name, signal.SIGCONT)
    world.change(chance, 10)
    world.settle()


@pytest.mark.timeout(900)
def test_brokers_die_under_members(world: World, kafka_cluster: KafkaCluster) -> None:
    chance = random.Random(6)
    world.change(chance, 30)
    for name in ("a", "b"):
        world.start(name)
        world.wait_written_by(name, chance)
    # One of them coordinates the group: another takes that over, and members and shares are as they were or move.
    for number in range(kafka_cluster.count):
        kafka_cluster.kill(number)
        world.change(chance, 20)
        world.settle(timeout_s=120.0)
        kafka_cluster.start(number)
        kafka_cluster.wait()
    for name in ("a", "b"):
        world.wait_written_by(name, chance)
    world.settle()


def test_how_fresh_all_members_are_is_known_elsewhere_and_the_oldest_counts(
    world: World, kafka_cluster: KafkaCluster
) -> None:
    chance = random.Random(8)
    world.change(chance, 60)
    for name in ("a", "b"):
        world.start(name)
        world.wait_written_by(name, chance)
    world.settle()
    # A home in which no member ever ran.
    config = config_of(kafka_cluster.brokers, world.topics, world.folder / "elsewhere", world.service.url)

    def fresh() -> AppFreshness:
        return app_freshness(config, "films", log_age_s=0.0, now=datetime.now(UTC))

    def write_canary() -> Canary:
        at, end = datetime.now(UTC), world.feed.writer.end()
        canary = Canary(position=Lsn(end.position.value + 1), written_at=at, heard_at=at, every_s=30.0)
        progress = {"canary": canary.to_json()}
        world.feed.writer.append(
            Group(batches=(), position=canary.position, previous_position=end.position, progress=progress)
        )
        return canary

    first = write_canary()
    world.wait(lambda: fresh().canary_s is not None and fresh().age_s == 0.0, what="the canary at every sink")
    names = {name: f"{socket.gethostname()}:{world.members[name]}" for name in ("a", "b")}
    members = {member.name: member for member in fresh().members}
    assert set(members) == set(names.values())
    assert sorted(share for member in members.values() for share in member.shares) == list(range(SHARES))
    assert {member.reached >= first.position for member in members.values()} == {True}

    # One stands: the other is as fresh as before, and the app is as old as the one that stands.
    world.signal("b", signal.SIGSTOP)
    world.change(chance, 5)
    second = write_canary()

    def standing() -> tuple[MemberFreshness, MemberFreshness]:
        found = {member.name: member for member in fresh().members}
        return found[names["a"]], found[names["b"]]

    world.wait(lambda: standing()[0].reached >= second.position, what="the canary at the sinks of the one that runs")
    seen, (runs, stands) = fresh(), standing()
    assert runs.canary_s is not None
    assert stands.canary_s is not None
    assert seen.canary_s == pytest.approx(stands.canary_s, abs=5.0)
    assert stands.canary_s - runs.canary_s == pytest.approx(
        (second.written_at - first.written_at).total_seconds(), abs=2.0
    )
    assert seen.reached == stands.reached < second.position
    assert (seen.age_s or 0.0) > 0.0
    samples = AgeCollector(config, "films").of(seen)
    told = {(sample.name, *sample.labels.values()): sample.value for family in samples for sample in family.samples}
    assert told["deltaworks_process_canary_age_seconds", "films"] == seen.canary_s
    assert ("deltaworks_process_member_canary_age_seconds", "films", names["b"]) in told

    # When others have its shares it is no member any more, and holds nothing back.
    world.settle()
    world.wait(lambda: [member.name for member in fresh().members] == [names["a"]], what="the shares of the dead")
    world.wait(lambda: fresh().age_s == 0.0, what="an app that is fresh again")
    world.signal("b", signal.SIGCONT)


def test_a_plain_tool_sees_how_far_every_share_is(world: World, kafka_cluster: KafkaCluster) -> None:
    chance = random.Random(5)
    world.change(chance, 30)
    world.start("a")
    world.settle()
    end = world.feed.writer.end().sequence + 1
    admin = AdminClient({"bootstrap.servers": kafka_cluster.brokers})

    def offsets() -> list[int]:
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(f"{world.topics}.films")])
        return [place.offset for found in asked.values() for place in found.result().topic_partitions]

    world.wait(lambda: offsets() == [end] * SHARES, what="all shares at the log's end")
