"""Requests for dumps, as files: whole or not at all, ended once, never in capture's way."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deltaworks.log.dump_requests import (
    DumpOutcome,
    DumpRequest,
    DumpRequests,
    Ending,
    UnknownDumpError,
    Wanted,
)
from deltaworks.request_folder import ENDED_KEPT, new_id


@pytest.fixture
def requests(tmp_path: Path) -> DumpRequests:
    return DumpRequests(tmp_path / "dumps" / "shop")


def outcome_of(request: DumpRequest, ending: Ending = Ending.DONE) -> DumpOutcome:
    return DumpOutcome(id=request.id, ending=ending, asked_at=request.asked_at, ended_at=datetime.now(UTC))


def test_request_is_read_back_as_it_was_asked_with_each_name_and_key_once(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t", "t"], keys=[("5", "é"), ("7", ""), ("5", "é")])
    requests.ask(request)
    assert list(DumpRequests(requests.folder).open()) == [request]
    assert (request.tables, request.keys) == (("t",), (("5", "é"), ("7", "")))


def test_ids_sort_by_time_within_a_millisecond_too() -> None:
    asked_at = [datetime(2026, 5, 17, microsecond=microsecond, tzinfo=UTC) for microsecond in range(40)]
    ids = [new_id(at) for at in asked_at]
    assert ids == sorted(ids)


def test_folder_that_is_not_there_has_no_requests(requests: DumpRequests) -> None:
    assert list(requests.open()) == []
    assert list(requests.outcomes()) == []


def test_wish_reaches_another_reader_of_the_folder(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t"])
    requests.ask(request)
    holder = DumpRequests(requests.folder)
    assert [each.wanted for each in holder.open()] == [Wanted.RUN]
    requests.want(request.id, Wanted.PAUSE)
    assert [each.wanted for each in holder.open()] == [Wanted.PAUSE]


def test_wish_for_a_dump_that_is_not_under_way_lists_those_that_are(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t"])
    requests.ask(request)
    with pytest.raises(UnknownDumpError, match=rf"'nope'.*known: {request.id}"):
        requests.want("nope", Wanted.CANCEL)


def test_ended_dump_is_closed_once_and_a_late_wish_does_not_bring_it_back(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t"])
    requests.ask(request)
    requests.end(outcome_of(request))
    requests.end(outcome_of(request, Ending.FAILED))
    requests.ask(request)  # as a wish that was read before the end and written after it
    assert list(requests.open()) == []
    outcome = requests.outcome(request.id)
    assert outcome is not None
    assert outcome.ending is Ending.DONE


def test_missing_keys_of_a_chunk_that_was_read_again_are_told_once(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t"], keys=[("1",)])
    requests.ask(request)
    requests.note_missing(request.id, first=500, keys=[("9",)])
    requests.note_missing(request.id, first=0, keys=[("1",), ("2",)])
    requests.note_missing(request.id, first=0, keys=[("1",)])
    with (requests.folder / f"{request.id}.missing.jsonl").open("a") as file:
        file.write('[1000, [["half')
    assert requests.missing(request.id) == (("1",), ("9",))


def test_file_that_is_no_request_is_put_aside(requests: DumpRequests) -> None:
    request = DumpRequest.new(["t"])
    requests.ask(request)
    for name, text in (("a", "{"), ("b", "[]"), ("c", json.dumps({"id": "c"}))):
        (requests.folder / f"{name}.request.json").write_text(text)
    assert list(requests.open()) == [request]
    assert list(requests.open()) == [request]
    assert len(list(requests.folder.glob("*.unreadable"))) == 3


def test_only_the_newest_outcomes_are_kept(requests: DumpRequests) -> None:
    for number in range(ENDED_KEPT + 3):
        request = DumpRequest(id=f"{number:04}", tables=("t",), asked_at=datetime.now(UTC))
        requests.end(outcome_of(request))
    assert [outcome.id for outcome in requests.outcomes()][-1] == "0003"
