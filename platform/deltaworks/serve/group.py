"""What the group of an app's members says, for a page that is looked at every second: asked beside, less often."""

import threading
import time
from collections.abc import Callable, Mapping

from deltaworks.errors import DeltaworksError
from deltaworks.log.membership import ShareStanding

EVERY_S = 2.0
"""How old an answer may be before the group is asked again; members say something every second."""
FIRST_S = 3.0
"""How long the first look waits for an answer."""


class Group:
    """One group. Any thread may look; servers that do not answer hold up nobody but the first."""

    def __init__(self, ask: Callable[[], Mapping[int, ShareStanding]]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._is_asking = False
        self._asked_at = float("-inf")
        self._has_answered = threading.Event()
        self._said: Mapping[int, ShareStanding] = {}
        self._fault: str | None = None

    def look(self) -> tuple[Mapping[int, ShareStanding], str | None]:
        """The newest answer, and why there is none: then the mapping is empty."""
        with self._lock:
            is_due = not self._is_asking and time.monotonic() - self._asked_at > EVERY_S
            if is_due:
                self._is_asking = True
        if is_due:
            threading.Thread(target=self._renew, name="group", daemon=True).start()
        is_there = self._has_answered.wait(FIRST_S)
        with self._lock:
            return self._said, self._fault if is_there else "it has not answered yet"

    def _renew(self) -> None:
        said: Mapping[int, ShareStanding] = {}
        fault: str | None = None
        try:
            said = self._ask()
        except DeltaworksError as error:
            fault = str(error)
        finally:
            with self._lock:
                self._said, self._fault = said, fault
                self._is_asking, self._asked_at = False, time.monotonic()
            self._has_answered.set()
