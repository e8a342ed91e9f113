"""An app's memory over a long replay stays flat: it has a range of the log and a cycle of entities, not the log."""

import json
import os
from pathlib import Path
from typing import Any, TypedDict

import pytest
from process.material import INT, TEXT, Feed, TableSink, create, table_schema, update
from servers import forked

from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.process.runner import Runner

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=INT)
KEYS, ROUNDS = 2_000, 80
FLAT_BYTES = 16 << 20
"""Of the second half's 80,000 changes 200 bytes each; an allocator's habits come to 3 MB."""


class Film(TypedDict):
    title: str


class Role(TypedDict):
    role_id: int


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def replay(config: Config, sink: Path, keeps_rows: bool, told: Path) -> None:
    studio = Source("studio")
    film, role = studio.table("film", schema=Film), studio.table("role", schema=Role)
    films = App("films", key="film_id", sources=[film, role] if keeps_rows else [film])

    @films.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        return {"title": film.after["title"].upper()}

    films.sink(TableSink(sink))
    seen: list[int] = []
    with Runner.open(films, config=config, name="films") as runner:
        # The log in forty parts, so that memory is looked at often.
        for end in range(ROUNDS // 40, ROUNDS + 1, ROUNDS // 40):
            while runner.checkpoint.sequence < end - 1:
                runner._cycle(up_to_sequence=end - 1, on_progress=None)
            runner._cycle(up_to_sequence=end - 1, on_progress=None)
            seen.append(resident_bytes())
    told.write_text(json.dumps(seen))


@pytest.mark.parametrize("keeps_rows", [False, True], ids=["direct", "with rows"])
def test_memory_is_as_large_after_the_whole_log_as_after_half_of_it(
    keeps_rows: bool, make_config: Any, tmp_path: Path
) -> None:
    config, told, output = make_config(), tmp_path / "told.json", tmp_path / "output.txt"
    with LocalLogWriter.open(config.log_folder("studio")) as writer:
        feed = Feed(writer)
        for number in range(ROUNDS):
            change = update if number else create
            feed.commit(*(change(FILM, film_id=key, title=f"{number} " * 10) for key in range(KEYS)))
    child = forked.call(replay, config, tmp_path / "sink.sqlite", keeps_rows, told, output=output)
    assert child.wait(timeout=100) == 0, output.read_text()
    seen = json.loads(told.read_text())
    assert len(seen) == 40
    first, second = max(seen[10:20]), max(seen[20:])
    assert second - first < FLAT_BYTES, [size >> 20 for size in seen]
