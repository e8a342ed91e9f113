"""PostgreSQL, a log on Kafka, the lake and an index: killed around commits, all end as the source is."""

import random
import signal
import threading

import pytest
import yaml
from flows.chain import ROOT, Studio, streamed_identities, wait
from servers import forked
from servers.kafka import KafkaCluster

from deltaworks import config as configuration
from deltaworks import operate
from deltaworks.store.search import SearchReader
from deltaworks.testing.faults import kill_at
from studio.updates import apply_updates

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

SEED = 5
STEPS = ("log.before_commit", "log.after_commit")
EXPECTED = """
    select movie_id, title, rating.imdb_votes from movie left join rating using (movie_id)
    where status not in ('draft', 'withdrawn')
"""


def die_at(step: str, after: int) -> None:
    kill_at(step, after=after)


@pytest.fixture
def kafka_studio(studio: Studio, small_kafka: KafkaCluster) -> Studio:
    """The studio with its log on Kafka."""
    settings = yaml.safe_load(studio.config_path.read_text())
    settings["sources"]["studio"]["log"] = {
        "kind": "kafka",
        "brokers": small_kafka.brokers,
        "topics": f"flow.{studio.database.name}",
        "replication_factor": 1,
        "allow_weak_topics": True,
    }
    studio.config_path.write_text(yaml.safe_dump(settings))
    studio.config = configuration.load(studio.config_path, environment={})
    return studio


def test_capture_killed_around_commits_leaves_lake_and_index_as_the_source(kafka_studio: Studio) -> None:
    studio, chance = kafka_studio, random.Random(SEED)
    studio.start_talent()
    process = studio.deltaworks("process", "movie_search")
    load = studio.deltaworks("load", "studio")
    stop = threading.Event()
    updates = threading.Thread(target=keep_updating, args=(studio, stop))
    updates.start()
    try:
        for kill in range(4):
            capture = start_capture(studio, STEPS[kill % 2], chance.randrange(1, 10))
            wait(lambda child=capture: child.poll() is not None, what="the death of capture")  # type: ignore[misc]
            assert capture.returncode == -signal.SIGKILL, (studio.config_path.parent / "capture.log").read_text()
            if kill == 2:
                process.kill()
                process.wait()
                process = studio.deltaworks("process", "movie_search")
    finally:
        stop.set()
        updates.join()
    for service in (process, load):
        service.kill()
        service.wait()

    operate.capture(studio.config, "studio")
    operate.process(studio.config, "movie_search")
    operate.load(studio.config, "studio")

    verification = operate.verify(studio.config, "studio")
    assert verification.is_equal, verification
    expected = {movie_id: (title, votes) for movie_id, title, votes in studio.database.rows(EXPECTED)}
    every = [str(key) for (key,) in studio.database.rows("select movie_id from movie")]
    hits = SearchReader(studio.config.index_folder("movie_search")).documents(every)
    assert {int(hit.key): (hit.body["title"], (hit.body["rating"] or {}).get("votes")) for hit in hits} == expected
    repeated = {identity: count for identity, count in streamed_identities(studio).items() if count > 1}
    assert not repeated


def keep_updating(studio: Studio, stop: threading.Event) -> None:
    seed = SEED
    while not stop.is_set():
        seed += 1
        apply_updates(studio.database.dsn, rate=150, seconds=0.5, seed=seed)


def start_capture(studio: Studio, step: str, after: int) -> forked.Child:
    child = forked.start(
        "capture",
        "studio",
        output=studio.config_path.parent / "capture.log",
        folder=ROOT,
        environment={"DELTAWORKS_CONFIG": str(studio.config_path), "STUDIO_DSN": studio.database.dsn},
        before=die_at,
        arguments=(step, after),
    )
    studio.children.append(child)
    return child
