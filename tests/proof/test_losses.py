"""Changes taken away at random at each hop are found, named by key and repaired; nothing else raises an alarm."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from proof.shop import LOST, ROWS, bring_through, fill, of_group, without
from servers.postgres import Database

from deltaworks import operate
from deltaworks.capture.proof import WindowSet
from deltaworks.change import ChangeBatch
from deltaworks.config import Config
from deltaworks.log.change_log import Group, StoredGroup
from deltaworks.operate.incident import IncidentState
from deltaworks.process.entity import Entity
from deltaworks.process.sink import Document
from deltaworks.testing.faults import lose_at


def forged(group: Group, keys: set[int], gone: list[int]) -> Group:
    """The group as a broken writer would leave it: without the changes, its counts put right, sums and xors not."""
    batches = without(group.batches, keys, gone)
    if group.proof is None or batches == group.batches:
        return group
    found = WindowSet.of(batches).windows
    windows = {
        key: replace(window, count=found[key].count)
        for key, window in group.proof.windows.windows.items()
        if key in found
    }
    return replace(group, batches=batches, proof=replace(group.proof, windows=type(group.proof.windows)(windows)))


Seam = tuple[str, str, Callable[[Any, set[int], list[int]], Any]]

SEAMS: list[Seam] = [
    ("log", "capture.append", forged),
    ("app items", "process.read", lambda groups, keys, gone: [of_group(group, keys, gone) for group in groups]),
    ("lake", "load.read", lambda groups, keys, gone: [of_group(group, keys, gone) for group in groups]),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("hop", "seam", "take_away"), SEAMS, ids=[hop for hop, *_ in SEAMS])
def test_lost_changes_are_named_by_key_and_repaired(
    hop: str, seam: str, take_away: Callable[..., Any], config: Config, database: Database, dice: random.Random
) -> None:
    operate.capture(config, "shop")
    fill(database)
    keys = set(dice.sample(range(1, ROWS + 1), LOST))
    gone: list[int] = []
    with lose_at(seam, lambda value: take_away(value, keys, gone)):
        operate.capture(config, "shop")
        if hop == "app items":
            operate.process(config, "items")
        operate.load(config, "shop")
    assert set(gone) == keys

    audit = operate.audit(config, "shop")
    assert not audit.is_balanced
    assert [incident.loss.hop for incident in audit.found] == [hop]
    (loss,) = [incident.loss for incident in audit.found]
    if hop != "log":
        assert loss.keys == {"public.item": loss.keys["public.item"]}
        assert {int(key) for (key,) in loss.keys["public.item"]} == keys
    before = operate.capture(config, "shop").offset
    (repaired,) = operate.repair(config, "shop")
    assert repaired.state is IncidentState.REPAIRED
    if hop == "app items":
        operate.process(config, "items")
    operate.load(config, "shop")
    # The dump read the rows of those keys and no other: they were named.
    assert operate.capture(config, "shop").offset - before == LOST
    assert operate.verify(config, "shop").is_equal
    again = operate.audit(config, "shop")
    assert again.is_balanced
    assert again.found == []


@pytest.mark.parametrize("sink", ["items", "lake"])
def test_a_document_lost_before_a_sink_is_named_and_repaired(
    sink: str, config: Config, database: Database, dice: random.Random
) -> None:
    operate.capture(config, "shop")
    fill(database, 5_000)
    keys = set(dice.sample([key for key in range(1, 5_001) if key % 10 >= 3], LOST))
    gone: list[int] = []

    def lose(documents: list[Document]) -> list[Document]:
        fresh = [each.key for each in documents if each.key in keys and each.key not in gone]
        gone.extend(fresh)
        return [each for each in documents if each.key not in fresh]

    def lose_at_load(groups: list[StoredGroup]) -> list[StoredGroup]:
        return [of_group(group, keys, gone) if group.header.proof else group for group in groups]

    if sink == "items":
        with lose_at("process.write", lose):
            bring_through(config)
    else:
        operate.capture(config, "shop")
        operate.process(config, "items")
        operate.load(config, "shop")
        with lose_at("load.read", lose_at_load):
            operate.load(config, "items")
    assert set(gone) == keys
    audit = operate.audit(config, "shop")
    hops = {incident.loss.hop for incident in audit.found}
    assert hops == ({"sink items/items"} if sink == "items" else {"lake items", "sink items/items"})
    for incident in audit.found:
        assert {int(key) for listed in incident.loss.keys.values() for (key,) in listed} == keys
    operate.repair(config, "shop")
    bring_through(config)
    assert operate.audit(config, "shop").is_balanced


def test_an_entity_lost_in_a_step_is_processed_again(config: Config, database: Database, dice: random.Random) -> None:
    operate.capture(config, "shop")
    fill(database, 5_000)
    keys = set(dice.sample([key for key in range(1, 5_001) if key % 10 >= 3], LOST))
    gone: list[int] = []

    def lose(work: tuple[list[Entity[Any]], list[Any]]) -> tuple[list[Entity[Any]], list[Any]]:
        fresh = {entity.key for entity in work[0] if entity.key in keys and entity.key not in gone}
        gone.extend(fresh)
        kept = [pair for pair in zip(*work, strict=True) if pair[0].key not in fresh]
        return [entity for entity, _ in kept], [value for _, value in kept]

    with lose_at("process.step", lose):
        bring_through(config)
    assert set(gone) == keys
    assert operate.audit(config, "shop").is_balanced


def test_duplicates_restarts_and_filters_raise_no_alarm(
    config: Config, database: Database, dice: random.Random
) -> None:
    operate.capture(config, "shop")
    doubled = np.random.default_rng(dice.randrange(2**32))

    def double(group: Group) -> Group:
        """One change in ten comes twice, as a reader sees it that is not sure."""
        batches = []
        for batch in group.batches:
            chosen = np.flatnonzero(doubled.random(len(batch)) < 0.1)
            places = np.sort(np.concatenate([np.arange(len(batch)), chosen]))
            batches.append(ChangeBatch(batch.schema, batch.rows.take(pa.array(places))))
        if group.proof is None or not batches:
            return group
        proof = replace(group.proof, windows=WindowSet.of(batches))
        return replace(group, batches=tuple(batches), proof=proof)

    with lose_at("capture.append", double):
        for part in range(4):
            first, last = part * 2_000 + 1, (part + 1) * 2_000
            database.execute(f"insert into item select i, 'item', i % 10 from generate_series({first}, {last}) i")
            database.execute(
                f"update item set kind = kind + 3 where id % 7 = {part}", f"delete from item where id % 97 = {part}"
            )
            # Each call opens capture, app and loads anew.
            dice.choice([bring_through, lambda config: operate.capture(config, "shop")])(config)
            assert operate.audit(config, "shop").is_balanced
    bring_through(config)
    audit = operate.audit(config, "shop")
    assert audit.is_balanced
    assert all(hop.handed == hop.arrived for hop in audit.hops)
