"""A server that is busy or refuses, document by document: an HTTP server that keeps the bulk API's promises."""

import gzip
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pytest
from contracts.sinks import config_with

from deltaworks.config import Config
from deltaworks.connection import OpenSearchConnection
from deltaworks.log.memory import MemoryLog
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App, Source
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Capabilities, Document, SinkAwayError
from deltaworks.store.sinks.opensearch_index import Asked, OpenSearchDelivery, connect
from deltaworks.store.sinks.opensearch_layout import META
from deltaworks.store.sinks.pending import PendingSink
from deltaworks.testing.changes import EPOCH, Feed, create, table_schema, update
from deltaworks.testing.service import Call, FakeService, Status

FILM = table_schema("film", "film_id", film_id=(pa.int64(), "bigint", False), title=(pa.string(), "text", False))
KEYS = [str(number) for number in range(40)]


class Film(TypedDict):
    title: str


class Index:
    """The part of the API that a flush uses: external versions, a status for each document of a bulk, an mget."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}
        self.busy_for: dict[str, int] = {}
        """How often a document is turned away yet."""

    def __call__(self, call: Call) -> Any:
        body = gzip.decompress(call.body) if call.headers.get("content-encoding") == "gzip" else call.body
        lines = [json.loads(line) for line in body.splitlines()]
        if "_bulk" in call.path:
            return {"items": [{"index": self._take(*pair)} for pair in zip(lines[::2], lines[1::2], strict=True)]}
        if "_mget" in call.path:
            return {"docs": [self._found(id_) for id_ in lines[0]["ids"]]}
        return {}

    def _take(self, action: Mapping[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        id_ = action["index"]["_id"]
        if self.busy_for.get(id_, 0) > 0:
            self.busy_for[id_] -= 1
            return {"status": 429, "error": {"type": "rejected_execution_exception"}}
        if source["title"] == "unfit":
            return {"status": 400, "error": {"type": "mapper_parsing_exception", "reason": "failed on field [title]"}}
        held = self.held.get(id_)
        if held is not None and held[META]["position"] >= action["index"].get("version", 1 << 62):
            return {"status": 409, "error": {"type": "version_conflict_engine_exception"}}
        self.held[id_] = source
        return {"status": 201}

    def _found(self, id_: str) -> dict[str, Any]:
        return {"_id": id_, "found": True, "_seq_no": 1, "_primary_term": 1, "_source": self.held[id_]}

    def titles(self) -> dict[str, str]:
        return {id_: source["title"] for id_, source in self.held.items()}


@dataclass(frozen=True)
class Spec:
    """The sink without the layout of its index."""

    url: str
    name: str = "films"
    capabilities: Capabilities = field(default_factory=Capabilities)

    def open(self, *, app: str, key: str, config: Config) -> PendingSink:
        asked = Asked()
        client = connect(OpenSearchConnection(kind="opensearch", hosts=(self.url,)), asked)
        return PendingSink(self.name, OpenSearchDelivery(client, self.name, asked))


@pytest.fixture
def index() -> Index:
    return Index()


@pytest.fixture
def service(index: Index) -> Iterator[FakeService]:
    with FakeService(index) as service:
        yield service


@pytest.fixture
def sink(service: FakeService, tmp_path: Path) -> Iterator[PendingSink]:
    sink = Spec(service.url).open(app="films", key="film_id", config=config_with(tmp_path))
    yield sink
    sink.close()


def films(title: Callable[[str], str] = str, *, position: int = 1) -> list[Document]:
    return [
        Document(key=key, version=Version(Lsn(position), number), committed_at=EPOCH, body={"title": title(key)})
        for number, key in enumerate(KEYS)
    ]


def test_documents_that_a_bulk_turned_away_are_sent_again_and_no_others(
    sink: PendingSink, index: Index, service: FakeService
) -> None:
    index.busy_for = {"3": 1, "7": 2}
    sink.write(films())
    assert sink.flush(up_to=Lsn(1)) == []
    assert index.titles() == {key: key for key in KEYS}
    bulks = [call for call in service.calls if "_bulk" in call.path]
    assert [len(gzip.decompress(call.body).splitlines()) // 2 for call in bulks] == [40, 2, 1]


def test_a_bulk_that_took_some_and_asks_for_a_pause_is_left_alone_as_long(
    sink: PendingSink, index: Index, service: FakeService
) -> None:
    index.busy_for = {"3": 1}
    service.script(Status(200, retry_after="17"))
    sink.write(films(lambda key: "unfit" if key == "9" else key))
    with pytest.raises(SinkAwayError, match="1 documents were not taken") as raised:
        sink.flush(up_to=Lsn(1))
    assert raised.value.after_s == 17
    # The same documents come again: those that were taken are known, and the refused one is named now.
    [refusal] = sink.flush(up_to=Lsn(1))
    assert (refusal.key, refusal.reason) == ("9", "the index refuses it: mapper_parsing_exception in field 'title'")
    assert index.titles() == {key: key for key in KEYS if key != "9"}


def test_a_server_that_turns_a_whole_bulk_away_is_left_alone_as_long_as_it_asks(
    sink: PendingSink, index: Index, service: FakeService
) -> None:
    service.script(Status(429, retry_after="23"))
    sink.write(films())
    with pytest.raises(SinkAwayError, match="answers 429") as raised:
        sink.flush(up_to=Lsn(1))
    assert raised.value.after_s == 23
    assert sink.flush(up_to=Lsn(1)) == []
    assert index.titles().keys() == set(KEYS)


def test_a_refused_document_is_a_dead_letter_and_the_busy_ones_arrive(
    service: FakeService, index: Index, tmp_path: Path
) -> None:
    app = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    app.sink(Spec(service.url))
    log = MemoryLog()
    feed = Feed(log.writer())
    feed.commit(*(create(FILM, film_id=int(key), title="unfit" if key == "9" else key) for key in KEYS))
    index.busy_for = {"3": 1, "30": 2}
    service.script(Status(200, retry_after="1"))
    began_at = time.monotonic()
    with Runner.open(app, config=config_with(tmp_path), name="films", log=log.reader()) as runner:
        report = runner.drain(patience_s=60)
        assert time.monotonic() - began_at >= 1
        [letter] = runner.dead()
        assert (report.dead, letter.key, letter.step) == (1, 9, "films")
        assert index.titles() == {key: key for key in KEYS if key != "9"}

        feed.commit(update(FILM, film_id=9, title="mended"), update(FILM, film_id=3, title="next"))
        runner.drain(patience_s=60)
        assert index.titles()["3"] == "next"
        runner.retry_dead()
        assert runner.drain(patience_s=60).dead == 0
    assert index.titles()["9"] == "mended"
