"""Kill -9 anywhere loses nothing and repeats nothing that anyone can see."""

import random
import threading
from collections.abc import Iterator
from itertools import takewhile

import pytest
from flows.chain import Studio, streamed_identities, wait

from deltaworks import operate
from deltaworks.log.change_log import GroupHeader
from deltaworks.log.local import LocalLogReader
from deltaworks.store.search import SearchReader
from studio.updates import apply_updates

SERVICES = {
    "capture": ("capture", "studio"),
    "process": ("process", "movie_search"),
    "load": ("load", "studio"),
}

EXPECTED = """
    select movie_id, title, rating.imdb_votes,
           array(select name from credit join person using (person_id)
                 where credit.movie_id = movie.movie_id and role = 'director' order by billing, credit_id)
    from movie left join rating using (movie_id)
    where status not in ('draft', 'withdrawn')
"""


def assert_index_is_as_the_database_says(studio: Studio) -> None:
    expected = {
        movie_id: (title, votes, directors) for movie_id, title, votes, directors in studio.database.rows(EXPECTED)
    }
    everything = [str(key) for (key,) in studio.database.rows("select movie_id from movie")]
    reader = SearchReader(studio.config.index_folder("movie_search"))
    found = {
        int(hit.key): (
            hit.body["title"],
            (hit.body["rating"] or {}).get("votes"),
            [person["name"] for person in hit.body["directors"]],
        )
        for hit in reader.documents(everything)
    }
    assert found == expected
    assert reader.freshness().document_count == len(expected)


def since(log: LocalLogReader, sequence: int) -> Iterator[GroupHeader]:
    """The groups after that one, the newest first; a canary's may follow those with changes."""
    return takewhile(lambda header: header.sequence > sequence, log.headers_backwards())


@pytest.mark.parametrize("seed", [11, 23, 47])
def test_kill_nine_at_random_moments_loses_and_repeats_nothing(studio: Studio, seed: int) -> None:
    chance = random.Random(seed)
    studio.start_talent()
    services = {name: studio.deltaworks(*command) for name, command in SERVICES.items()}
    updates = threading.Thread(
        target=apply_updates, args=(studio.database.dsn,), kwargs={"rate": 300, "seconds": 5, "seed": seed}
    )
    updates.start()
    kills = 0
    while updates.is_alive():
        threading.Event().wait(chance.uniform(0.1, 0.7))
        name = chance.choice(list(services))
        services[name].kill()
        services[name].wait()
        services[name] = studio.deltaworks(*SERVICES[name])
        kills += 1
    updates.join()
    assert kills >= 5
    for service in services.values():
        service.kill()
        service.wait()

    operate.capture(studio.config, "studio")
    operate.process(studio.config, "movie_search")
    operate.load(studio.config, "studio")
    operate.load(studio.config, "movie_search")

    verification = operate.verify(studio.config, "studio")
    assert verification.is_equal, verification
    assert_index_is_as_the_database_says(studio)
    repeated = [identity for identity, count in streamed_identities(studio).items() if count > 1]
    assert not repeated


def test_a_service_that_is_down_makes_films_wait_and_nothing_is_skipped(studio: Studio) -> None:
    talent = studio.start_talent()
    operate.capture(studio.config, "studio")
    operate.process(studio.config, "movie_search")
    talent.kill()
    talent.wait()
    log = LocalLogReader(studio.config.log_folder("studio"))
    before = log.end().sequence
    process, capture = studio.deltaworks("process", "movie_search"), studio.deltaworks("capture", "studio")
    studio.database.execute(
        "update movie set title = title || ' Zyzzyva' where movie_id in (select movie_id from movie order by 1 limit 5)"
    )
    reader = SearchReader(studio.config.index_folder("movie_search"))
    wait(lambda: any(header.max_txid for header in since(log, before)), what="the changes in the log")
    assert not reader.search("zyzzyva", limit=10).hits

    studio.start_talent()
    wait(lambda: reader.search("zyzzyva", limit=10).total == 5, what="the films in the index")
    assert process.poll() is None
    assert capture.poll() is None
