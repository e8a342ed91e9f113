"""A sink that keeps nothing, in the place of one that a replay must not write to."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaworks.config import Config
from deltaworks.position import Lsn
from deltaworks.process.sink import Capabilities, Document, Refusal


@dataclass(frozen=True, slots=True)
class Nowhere:
    """A `SinkSpec` under the name of another, so that routes to it go on being right."""

    name: str

    @property
    def capabilities(self) -> Capabilities:
        """None."""
        return Capabilities()

    def open(self, *, app: str, key: str, config: Config) -> "Nowhere":  # noqa: ARG002
        """Nothing to open."""
        return self

    def write(self, documents: Sequence[Document]) -> None:
        """Let them go."""

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:  # noqa: ARG002
        """Nothing is pending."""
        return []

    def close(self) -> None:
        """Nothing to release."""
