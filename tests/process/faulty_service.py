"""The kit's fake service as one that knows names by number, with faults by a word."""

from collections.abc import Callable
from typing import Any

from deltaworks.testing.service import Call, CutOff, FakeService, Rubbish, Slow, Status


class FaultyService(FakeService):
    """Knows names by number, and fails as it is told to.

    `fault` says for the ids of a request what to answer: `None` for the truth, a status, or a word.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.fault: Callable[[list[int]], int | str | None] = lambda ids: None
        self.retry_after: str | None = None
        super().__init__(self._names_of)

    @property
    def requests(self) -> list[list[int]]:
        """The ids of every request, in the order they came."""
        return [call.json["ids"] for call in self.calls]

    def _names_of(self, call: Call) -> Any:
        ids = call.json["ids"]
        truth = {str(id_): self.names[id_] for id_ in ids if id_ in self.names}
        match self.fault(ids):
            case int() as status:
                return Status(status, self.retry_after)
            case "slow":
                return Slow(0.4, truth)
            case "garbage":
                return Rubbish()
            case "partial":
                return CutOff(truth)
        return truth
