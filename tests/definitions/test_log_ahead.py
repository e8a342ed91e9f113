"""When the sensor asks for a load: at once after a burst, seldom under a steady stream, later after a failure."""

import pytest

from sensors.log_ahead import LOAD_EVERY_S, RETRY_AFTER_S, Memory, reason_to_wait

NOW = 1_000_000.0


def is_due(memory: Memory, place: str = "studio@9", *, quiet: bool) -> bool:
    return reason_to_wait(memory, place, is_quiet=lambda: quiet, now=NOW) is None


def test_a_log_that_paused_is_loaded_at_once() -> None:
    assert is_due(Memory(), quiet=True)
    assert is_due(Memory(behind_since=NOW - 2), quiet=True)


@pytest.mark.parametrize(("waited_s", "due"), [(0.0, False), (LOAD_EVERY_S - 1, False), (LOAD_EVERY_S, True)])
def test_changes_that_keep_coming_are_loaded_after_a_bounded_time(waited_s: float, due: bool) -> None:
    assert is_due(Memory(behind_since=NOW - waited_s), quiet=False) == due


def test_loads_keep_their_distance_however_quiet_the_log_is() -> None:
    memory = Memory(asked_for="studio@5", asked_at=NOW - LOAD_EVERY_S + 1)
    assert not is_due(memory, quiet=True)
    assert is_due(Memory(asked_for="studio@5", asked_at=NOW - LOAD_EVERY_S), quiet=True)


def test_a_load_that_failed_is_asked_for_again_later_or_when_there_is_more() -> None:
    failed = Memory(asked_for="studio@9", asked_at=NOW - RETRY_AFTER_S + 1)
    assert not is_due(failed, quiet=True)
    assert is_due(failed, "studio@10", quiet=True)
    assert is_due(Memory(asked_for="studio@9", asked_at=NOW - RETRY_AFTER_S), quiet=True)
