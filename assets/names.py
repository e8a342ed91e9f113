"""Asset keys: the state of the data, then where it comes from, then the table."""

import dagster as dg


def in_source(source: str, table: str) -> dg.AssetKey:
    """A table in the source database; Dagster does not run it."""
    return dg.AssetKey([source, table])


def captured(source: str, table: str) -> dg.AssetKey:
    """The changes of a table in the change log."""
    return dg.AssetKey(["captured", source, table])


def dumped(source: str) -> dg.AssetKey:
    """Existing rows of a source's tables, read again on demand; a partition per table."""
    return dg.AssetKey(["dumped", source])


def stored(source: str, table: str) -> dg.AssetKey:
    """A table in the lake, in step with the log."""
    return dg.AssetKey(["stored", source, table])


def enriched(app: str, table: str) -> dg.AssetKey:
    """What an app made of the changes, in the lake."""
    return dg.AssetKey(["enriched", app, table])


def dead_letters(app: str) -> dg.AssetKey:
    """What failed for good in an app."""
    return dg.AssetKey(["dead_letters", app])


def reprocessed(app: str) -> dg.AssetKey:
    """An app's documents, made anew on demand; a partition is a part of its keys."""
    return dg.AssetKey(["reprocessed", app])


def modeled(model: str) -> dg.AssetKey:
    """A dbt model."""
    return dg.AssetKey(["modeled", model])


RELEASED = dg.AssetKey("released")


def unknown(source: str, table: str) -> str:
    """What to say of a table that a pattern brought since the definitions were loaded."""
    return f"{source}.{table} is new: reload the code location, and it is an asset too"
