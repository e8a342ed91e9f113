"""What the page asks of a group of members, whose servers may be away."""

import threading
from collections.abc import Mapping

import pytest
from process.material import wait_until

from deltaworks.log.change_log import LogAwayError
from deltaworks.log.membership import ShareStanding
from deltaworks.serve import group
from deltaworks.serve.group import Group


def test_nobody_waits_for_a_group_that_hangs_and_its_answer_is_kept_while_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "EVERY_S", 0.0)
    monkeypatch.setattr(group, "FIRST_S", 0.05)
    answers, asked = threading.Event(), []

    def ask() -> Mapping[int, ShareStanding]:
        asked.append(1)
        answers.wait(10)
        return {0: ShareStanding(done=len(asked))}

    looked = Group(ask)
    assert looked.look() == ({}, "it has not answered yet")
    # One question at a time, however many look.
    assert looked.look() == ({}, "it has not answered yet")
    assert len(asked) == 1
    answers.set()
    wait_until(lambda: looked.look()[0] != {})
    answers.clear()
    wait_until(lambda: (looked.look(), len(asked))[1] > 1)
    said, fault = looked.look()
    assert (said.keys(), fault) == ({0}, None)
    answers.set()


def test_why_a_group_does_not_answer_is_said_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "EVERY_S", 0.0)
    is_away = True

    def ask() -> Mapping[int, ShareStanding]:
        if is_away:
            raise LogAwayError("brokers are away")
        return {0: ShareStanding(done=1)}

    looked = Group(ask)
    assert looked.look() == ({}, "brokers are away")
    is_away = False
    wait_until(lambda: looked.look() == ({0: ShareStanding(done=1)}, None))
