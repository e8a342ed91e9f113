"""What happened to a source besides its changes: schema changes, and gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import structlog

from deltaworks.capture.continuity import Gap
from deltaworks.capture.schema_change import SchemaChange
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError
from deltaworks.log.registry import log_of, open_reader
from deltaworks.log.watch import read_survey
from deltaworks.schema import TableName

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the log says of its source after a group, up to group `sequence`.

    `schema_changes` are in order. `gaps` are those that are not repaired yet at the log's end.
    """

    sequence: int
    schema_changes: Sequence[SchemaChange]
    gaps: Sequence[Gap]


def tables_met(config: Config, source: str) -> Sequence[TableName]:
    """The tables that capture has met: those that are named, then those that were there for the patterns.

    Asks nobody but the log, and that only where there are patterns; a log that is away counts as empty.
    """
    settings = config.source(source)
    if not settings.table_patterns:
        return settings.table_names
    try:
        reader = log_of(config, source).near_reader()
        survey = read_survey(reader, reader.end().progress)
    except DeltaworksError as error:
        logger.warning("tables of patterns are not known", source=source, error=str(error))
        survey = None
    met = () if survey is None else sorted(survey.tables, key=str)
    return [*settings.table_names, *(table for table in met if table not in settings.table_names)]


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
