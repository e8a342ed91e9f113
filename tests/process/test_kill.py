"""A following process is killed with SIGKILL at random moments; the next one goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, PERSON, ROLE
from process.material import Feed, TableSink, create, delete, update, wait_until

from deltaworks.log.local import LocalLogWriter

CHILD = Path(__file__).with_name("following_child.py")


class Follower:
    """Runs the app in processes of its own; the one that forks them imports once for all tests."""

    def __init__(self) -> None:
        command = [sys.executable, str(CHILD)]
        self.parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.arguments: tuple[str, ...] = ()
        self.pid = 0

    def start(self) -> None:
        self.parent.stdin.write(" ".join(self.arguments) + "\n")
        self.parent.stdin.flush()
        word, number = self.parent.stdout.readline().split()
        assert word == "ready"
        self.pid = int(number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        # Had the sink been given a document older than what it has, the process would have ended by itself.
        assert self.parent.stdout.readline() == f"ended -{signal.SIGKILL.value}\n"


@pytest.fixture(scope="module")
def forking() -> Iterator[Follower]:
    found = Follower()
    with found.parent:
        yield found


@pytest.fixture
def follower(forking: Follower, tmp_path: Path, sink: TableSink, service: FaultyService) -> Follower:
    forking.arguments = (str(tmp_path / "home"), str(sink.file), service.url)
    return forking


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random_moments_nothing_is_lost_and_no_document_goes_back(
    seed: int, tmp_path: Path, sink: TableSink, service: FaultyService, follower: Follower
) -> None:
    dice = random.Random(seed)
    service.names = {number: f"person {number}" for number in range(1, 6)}
    films: dict[int, str] = {}
    with LocalLogWriter.open(tmp_path / "home" / "log" / "studio") as writer:
        feed = Feed(writer)
        feed.commit(*(create(ROLE, role_id=n, film_id=n, person_id=n % 5 + 1) for n in range(20)))
        for _ in range(5):
            follower.start()
            deadline = time.monotonic() + dice.uniform(0.02, 0.4)
            while time.monotonic() < deadline:
                _change_something(feed, films, service, dice)
            follower.kill()

        follower.start()
        expected = {
            film_id: {"title": title, "cast": [service.names[film_id % 5 + 1]]} for film_id, title in films.items()
        }
        try:
            wait_until(lambda: sink.bodies() == expected)
        finally:
            follower.kill()


def _change_something(feed: Feed, films: dict[int, str], service: FaultyService, dice: random.Random) -> None:
    film_id = dice.randrange(20)
    match dice.randrange(4):
        case 0 if film_id in films:
            del films[film_id]
            feed.commit(delete(FILM, film_id=film_id))
        case 1:
            person_id = dice.randrange(1, 6)
            service.names[person_id] = f"name {dice.random()}"
            feed.commit(update(PERSON, person_id=person_id, name=service.names[person_id]))
        case _:
            change = update if film_id in films else create
            films[film_id] = f"title {dice.random()}"
            feed.commit(change(FILM, film_id=film_id, title=films[film_id], status="released"))
