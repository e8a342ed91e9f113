"""Reprocessed: an app's documents made anew on demand; a partition is an even part of the app's keys.

For a step or a service that gives other answers now. A backfill over all partitions makes every document anew, one
part after the other, and can be stopped and gone on with; a run with `keys` makes those alone.
"""

import time
from collections.abc import Callable
from typing import Any

import dagster as dg
from pydantic import Field

from assets import names
from deltaworks import operate
from deltaworks.config import Config
from deltaworks.process.requests import Slice
from resources.deltaworks_config import DeltaworksConfig

PARTS = 16
"""Parts of an app's keys: each small enough to be done again after a failure, all of them few enough to look at."""
LOG_EVERY_S = 5.0
"""How often a run says how far it is."""


class ReprocessChoice(dg.Config):
    """The keys to make anew instead of the partition's."""

    keys: list[str] = Field(default_factory=list)


def reprocessed_documents(app: str, config: Config) -> dg.AssetsDefinition:
    """Make the documents of one part of an app's keys anew; the running service does it, or this run."""
    source = config.apps[app].source

    @dg.asset(
        key=names.reprocessed(app),
        partitions_def=dg.StaticPartitionsDefinition([f"{index:02}" for index in range(PARTS)]),
        deps=[names.captured(source, short) for short in operate.tables_read_by(config, app)],
        description=f"Documents of the app `{app}`, made anew from the rows it has: a part of its keys by a hash, or "
        "chosen keys. For a step or a service that gives other answers now.",
        group_name="process",
        kinds={"python"},
        owners=[f"team:{config.sources[source].owner}"],
    )
    def reprocessed(
        context: dg.AssetExecutionContext, config: ReprocessChoice, deltaworks: DeltaworksConfig
    ) -> dg.MaterializeResult[Any]:
        answered = operate.reprocess(
            deltaworks.load(),
            app,
            keys=config.keys or None,
            part=None if config.keys else Slice(index=int(context.partition_key), count=PARTS),
            on_progress=_said_now_and_then(context),
        )
        context.log.info(answered.summary)
        outcome = answered.outcome
        return dg.MaterializeResult(
            metadata={
                "dagster/partition_row_count": outcome.count,
                "request": outcome.id,
                "answered_by": answered.answered_by,
                "set_back": outcome.set_back,
                "keys_not_found": outcome.missing,
                "took_s": (outcome.ended_at - outcome.asked_at).total_seconds(),
            }
        )

    return reprocessed


def _said_now_and_then(context: dg.AssetExecutionContext) -> Callable[[int, int], None]:
    said_at = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= LOG_EVERY_S:
            said_at = time.monotonic()
            context.log.info(f"{done:,} of {total:,}")

    return say
