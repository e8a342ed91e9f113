"""What a log knows of the tables in it."""

from collections.abc import Collection, Mapping
from itertools import islice

from deltaworks.change import MESSAGES
from deltaworks.log.change_log import LogReader
from deltaworks.schema import TableName, TableSchema


def latest_schemas(log: LogReader, *, wanted: Collection[TableName] | None = None) -> Mapping[TableName, TableSchema]:
    """Each table's schema as of its newest batch; `wanted` tables only, and only those that have one.

    Reads headers from the end, and the changes of one group per table. A log in which a wanted
    table never appears is read to its first header.
    """
    missing = None if wanted is None else {str(name) for name in wanted}
    found: dict[TableName, TableSchema] = {}
    for header in log.headers_backwards():
        if missing is not None and not missing:
            break
        known = {str(name) for name in (*found, MESSAGES)}
        here = set(header.tables) - known if missing is None else set(header.tables) & missing
        if not here:
            continue
        for group in islice(log.read(after_sequence=header.sequence - 1), 1):
            # The last batch of a table in the group has its newest schema.
            found |= {batch.schema.name: batch.schema for batch in group.batches if str(batch.schema.name) in here}
        if missing is not None:
            missing -= here
    return found
