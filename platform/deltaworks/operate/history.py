"""What happened to a source besides its changes: schema changes, and gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from deltaworks.capture.continuity import Gap
from deltaworks.capture.schema_change import SchemaChange
from deltaworks.config import Config
from deltaworks.log.registry import open_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the log says of its source after a group, up to group `sequence`.

    `schema_changes` are in order. `gaps` are those that are not repaired yet at the log's end.
    """

    sequence: int
    schema_changes: Sequence[SchemaChange]
    gaps: Sequence[Gap]


def history(config: Config, source: str, *, after_sequence: int = -1) -> History:
    """Read it out of the headers of the groups; reads no changes."""
    reader = open_reader(config, source)
    end = reader.end()
    headers = takewhile(lambda header: header.sequence > after_sequence, reader.headers_backwards())
    newest_first = [header.progress.get("schema_changes", ()) for header in headers]
    return History(
        sequence=end.sequence,
        schema_changes=[SchemaChange.from_json(change) for group in reversed(newest_first) for change in group],
        gaps=[Gap.from_json(gap) for gap in end.progress.get("gaps", ())],
    )
