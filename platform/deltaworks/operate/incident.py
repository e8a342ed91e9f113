"""Incidents: losses that an audit found, with their keys, kept until and after they are repaired.

    home/audit/<source>/<id>.json    readable by the owner alone: keys are data

A loss stays an incident for ever, because the windows of its hop lack those changes for ever: the next audit
subtracts what is known.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

from deltaworks.capture.proof import WindowSet
from deltaworks.config import Config
from deltaworks.log.audit import Loss
from deltaworks.request_folder import new_id


class IncidentState(Enum):
    """Where an incident stands.

    | state    | set by                                                                   |
    |----------|--------------------------------------------------------------------------|
    | open     | the audit that found it                                                  |
    | repaired | `repair`, when a dump of its keys is in the log; every hop takes them there |
    | settled  | `repair`, when no row differs: what was lost was overwritten since        |
    """

    OPEN = "open"
    REPAIRED = "repaired"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One loss: the hop, the groups of the log, the windows, the keys. `dumps` are the ids of those that mended it."""

    id: str
    found_at: datetime
    loss: Loss
    state: IncidentState = IncidentState.OPEN
    dumps: tuple[str, ...] = ()
    ended_at: datetime | None = None

    @classmethod
    def of(cls, loss: Loss) -> Self:
        """A new one; ids sort by time."""
        now = datetime.now(UTC)
        return cls(id=new_id(now), found_at=now, loss=loss)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave."""
        loss = Loss(
            hop=stored["hop"],
            after=stored["after"],
            up_to=stored["up_to"],
            missing=WindowSet.from_json(stored["missing"]),
            keys={table: tuple(tuple(key) for key in keys) for table, keys in stored["keys"].items()},
            is_whole=stored["is_whole"],
            what=stored["what"],
        )
        return cls(
            id=stored["id"],
            found_at=datetime.fromisoformat(stored["found_at"]),
            loss=loss,
            state=IncidentState(stored["state"]),
            dumps=tuple(stored["dumps"]),
            ended_at=stored["ended_at"] and datetime.fromisoformat(stored["ended_at"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The incident as JSON values, its keys included."""
        loss = self.loss
        return {
            "id": self.id,
            "found_at": self.found_at.isoformat(),
            "state": self.state.value,
            "dumps": list(self.dumps),
            "ended_at": self.ended_at and self.ended_at.isoformat(),
            "hop": loss.hop,
            "after": loss.after,
            "up_to": loss.up_to,
            "missing": loss.missing.to_json(),
            "keys": {table: [list(key) for key in keys] for table, keys in loss.keys.items()},
            "is_whole": loss.is_whole,
            "what": loss.what,
        }

    @property
    def summary(self) -> str:
        """One line without keys, for logs and people."""
        keys = sum(map(len, self.loss.keys.values()))
        named = f", {keys:,} keys" if keys else ""
        tables = ", ".join(self.loss.tables or self.loss.keys) or self.loss.what
        return f"{self.id}: {self.loss.hop}, {self.loss.count:,} changes of {tables}{named}: {self.state.value}"


@dataclass(frozen=True, slots=True)
class Incidents:
    """Those of one source, in a folder that need not exist yet."""

    folder: Path = field()

    @classmethod
    def of(cls, config: Config, source: str) -> Self:
        """The incidents of a source of the configuration."""
        config.source(source)
        return cls(config.home / "audit" / source)

    def all(self) -> list[Incident]:
        """Every one, oldest first."""
        paths = sorted(self.folder.glob("*.json")) if self.folder.exists() else []
        return [Incident.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def open(self) -> list[Incident]:
        """Those that are not repaired."""
        return [incident for incident in self.all() if incident.state is IncidentState.OPEN]

    def add(self, losses: Sequence[Loss]) -> list[Incident]:
        """Keep losses that no incident tells of; gives the new ones. Of audits at one moment only one keeps a loss."""
        found: list[Incident] = []
        if not losses:
            return found
        with self._alone():
            told = self.all()
            for loss in losses:
                if not any(_tells_of(incident, loss) for incident in told):
                    found.append(Incident.of(loss))
                    self.save(found[-1])
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes and threads from adding; the kernel lets go when the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def end(self, incident: Incident, state: IncidentState, *, dumps: Sequence[str] = ()) -> Incident:
        """Say how it ended; durable when this returns."""
        ended = replace(incident, state=state, dumps=(*incident.dumps, *dumps), ended_at=datetime.now(UTC))
        self.save(ended)
        return ended

    def save(self, incident: Incident) -> None:
        """Write it whole or not at all; durable when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{incident.id}.json"
        draft = path.with_suffix(".draft")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(incident.to_json(), file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def known(self) -> dict[str, dict[int, WindowSet]]:
        """What was told of each hop, by the sequence that its groups follow."""
        known: dict[str, dict[int, WindowSet]] = {}
        for incident in self.all():
            loss = incident.loss
            of_hop = known.setdefault(loss.hop, {})
            of_hop[loss.after] = of_hop.get(loss.after, WindowSet()).merge(loss.missing)
        return known

    def mended(self) -> dict[str, WindowSet]:
        """By hop, what its windows lack of losses that are repaired or settled."""
        mended: dict[str, WindowSet] = {}
        for incident in self.all():
            if incident.state is not IncidentState.OPEN:
                hop = incident.loss.hop
                mended[hop] = mended.get(hop, WindowSet()).merge(incident.loss.missing)
        return mended


def _tells_of(incident: Incident, loss: Loss) -> bool:
    """Whether it is that loss. One that ended may have been found and mended by another audit since ours began; a
    later loss of the same keys lacks other changes.
    """
    is_open = incident.state is IncidentState.OPEN
    return _is_same(loss, incident.loss) and (is_open or loss.missing == incident.loss.missing)


def _is_same(loss: Loss, other: Loss) -> bool:
    return (loss.hop, loss.after, loss.what, dict(loss.keys)) == (
        other.hop,
        other.after,
        other.what,
        dict(other.keys),
    )
