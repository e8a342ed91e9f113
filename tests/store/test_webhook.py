"""What only a webhook does: signatures, idempotency keys, and the mercy of each status."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from contracts.sinks import config_with
from servers.webhook import SECRET, Receiver

from deltaworks.config import ConfigError
from deltaworks.position import Lsn, Version
from deltaworks.process.sink import Document, Sink, SinkAwayError
from deltaworks.store.sinks.webhook import Webhook, is_authentic, signed

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def document(key: Any, position: int, body: Any = "there") -> Document:
    shown = None if body is None else {"title": body}
    return Document(key=key, version=Version(Lsn(position), 0), committed_at=MOMENT, body=shown)


@pytest.fixture
def sink(receiver: Receiver, tmp_path: Path) -> Iterator[Sink]:
    config = config_with(
        tmp_path, partner={"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}/hook", "secret": SECRET}
    )
    sink = Webhook("releases", connection="partner").open(app="films", key="film_id", config=config)
    yield sink
    sink.close()


def test_an_event_says_what_when_and_under_which_key(receiver: Receiver, sink: Sink) -> None:
    sink.write([document(7, 24, "Alien")])
    sink.flush(up_to=Lsn(24))
    [event] = receiver.requests
    assert len(event.pop("idempotency_key")) == 64
    assert event == {
        "sink": "releases",
        "key": 7,
        "position": 24,
        "ordinal": 0,
        "committed_at": "2026-01-01T00:00:00+00:00",
        "document": {"title": "Alien"},
    }


def test_the_idempotency_key_is_that_of_key_and_version(receiver: Receiver, sink: Sink) -> None:
    for key, position in ((7, 24), (7, 24), (7, 25), (8, 24)):
        sink.write([document(key, position)])
        sink.flush(up_to=Lsn(0))
    first, again, later, other = (event["idempotency_key"] for event in receiver.requests)
    assert first == again
    assert len({first, later, other}) == 3


def test_a_signature_is_refused_when_anything_of_it_is_not_right() -> None:
    body, now = b'{"key": 7}', 1_000_000.0
    headers = dict(signed(body, secret=SECRET, timestamp=int(now)))
    assert is_authentic(body, headers, secret=SECRET, now=now + 299)
    assert not is_authentic(body, headers, secret=SECRET, now=now + 301)
    assert not is_authentic(body + b" ", headers, secret=SECRET, now=now)
    assert not is_authentic(body, headers, secret=SECRET + "x", now=now)
    assert not is_authentic(body, {}, secret=SECRET, now=now)
    assert not is_authentic(body, headers | {"Deltaworks-Timestamp": "999999"}, secret=SECRET, now=now)


@pytest.mark.parametrize("status", [301, 401, 403, 408, 425, 429, 500, 503])
def test_an_answer_that_may_pass_is_tried_again_and_what_was_taken_is_not(
    receiver: Receiver, sink: Sink, status: int
) -> None:
    sink.write([document(number, number) for number in range(1, 9)])
    receiver.answers = [(204, {})] * 3 + [(status, {})]
    with pytest.raises(SinkAwayError, match=f"answers {status}"):
        sink.flush(up_to=Lsn(8))
    sink.write([document(number, number) for number in range(1, 9)])
    assert sink.flush(up_to=Lsn(8)) == []
    assert len(receiver.documents()) == 8
    assert len(receiver.requests) == 9


@pytest.mark.parametrize("status", [400, 404, 409, 410, 413, 422])
def test_any_other_answer_refuses_the_document_and_takes_the_others(
    receiver: Receiver, sink: Sink, status: int
) -> None:
    sink.write([document(1, 1), document(2, 2)])
    receiver.answers = [(status, {})]
    [refusal] = sink.flush(up_to=Lsn(2))
    assert refusal.reason == f"the receiver answers {status}"
    assert len(receiver.documents()) == 1


@pytest.mark.parametrize(("header", "least", "most"), [("7", 7, 7), ("in a while", None, None), ("http date", 50, 61)])
def test_retry_after_is_honoured_in_both_forms(
    receiver: Receiver, sink: Sink, header: str, least: float | None, most: float | None
) -> None:
    if header == "http date":
        header = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    receiver.answers = [(429, {"Retry-After": header})]
    sink.write([document(1, 1)])
    with pytest.raises(SinkAwayError) as raised:
        sink.flush(up_to=Lsn(1))
    after_s = raised.value.after_s
    assert (after_s is None) if least is None or most is None else (after_s is not None and least <= after_s <= most)


def test_a_receiver_that_wants_no_deletions_gets_none(receiver: Receiver, tmp_path: Path) -> None:
    config = config_with(
        tmp_path, partner={"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}", "secret": SECRET}
    )
    sink = Webhook("releases", connection="partner", deletions=False).open(app="films", key="film_id", config=config)
    sink.write([document(1, 1), document(2, 2, None)])
    sink.flush(up_to=Lsn(2))
    sink.close()
    assert [event["key"] for event in receiver.requests] == [1]


def test_a_connection_of_another_kind_or_name_is_told_apart(tmp_path: Path) -> None:
    config = config_with(tmp_path, cache={"kind": "redis", "url": "redis://:the-secret@nowhere"})
    for name in ("partner", "cache"):
        with pytest.raises(ConfigError, match=f"{name}'.*known: none"):
            Webhook("releases", connection=name).open(app="films", key="film_id", config=config)
