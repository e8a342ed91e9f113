"""Tells the steps that watch a column of every turn it took, in order for each entity."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from deltaworks import faults
from deltaworks.process import metrics
from deltaworks.process.app import App
from deltaworks.process.declared import OnChangeStep
from deltaworks.process.entity import Transition
from deltaworks.process.pipeline import next_try_after
from deltaworks.process.state import State
from deltaworks.process.step import STEP_ERRORS, call, fault_of
from deltaworks.process.stuck import StepStuckError, Stuck
from deltaworks.process.turns import WaitingTurn

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a round came to: steps that were called, and those of them that took their turn."""

    tried: int
    taken: int


class Telling:
    """The reactions of one app. A step is told one turn of an entity at a time; entities go side by side.

    `check` raises where this process may not tell of them any more.
    """

    def __init__(
        self,
        *,
        app: App,
        name: str,
        state: State,
        clients: dict[str, Any],
        loop: asyncio.Runner,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._steps = {step.name: step for step in app.reactions}
        self._name = name
        self._state = state
        self._clients = clients
        self._loop = loop
        self._check = check
        self.stuck: Stuck | None = None
        """A turn that ended the process before; its step is not tried on it again."""

    def run(self, *, limit: int) -> Told:
        """Tell the turns that are due, among the `limit` oldest.

        Raises:
            MembershipLostError: the app is shared, and these may be others' by now; none was told.
        """
        ready = self._state.turns.due(now=time.time(), limit=limit) if self._steps else []
        if ready:
            self._check()
        taken = self._loop.run(self._tell_all(ready)) if ready else []
        return Told(tried=len(ready), taken=sum(taken))

    async def _tell_all(self, turns: Sequence[WaitingTurn]) -> list[bool]:
        return await asyncio.gather(*(self._tell(self._steps.get(turn.step), turn) for turn in turns))

    async def _tell(self, step: OnChangeStep | None, turn: WaitingTurn) -> bool:
        if step is None:
            # The step was removed from the app, and with it the wish to be told.
            self._take(turn)
            return False
        try:
            if self.stuck is not None and self.stuck.is_of(step.name, turn.entity, turn.version):
                raise StepStuckError
            await call(step, self._transition(step, turn), self._clients, timeout_s=step.timeout_s)
        except STEP_ERRORS as error:
            fault = fault_of(step, error)
            attempts = turn.attempts + 1
            next_try = next_try_after(fault, attempts=attempts, retry=step.retry)
            with self._state.settling():
                if next_try is None:
                    holds_key = step.on_fail.hold_key
                    self._state.turns.bury(
                        turn, attempts=attempts, error=fault.error, place=step.place, holds_key=holds_key
                    )
                else:
                    self._state.turns.hold(turn, attempts=attempts, next_try=next_try, error=fault.error)
            metrics.count_step(
                self._name, step.name, taken=1, out=0, retried=int(next_try is not None), failed=int(next_try is None)
            )
            logger.warning("transition set back", app=self._name, step=step.name, error=fault.error, attempts=attempts)
            return False
        metrics.count_step(self._name, step.name, taken=1, out=1)
        faults.reach("process.after_turn")
        self._take(turn)
        return True

    def _take(self, turn: WaitingTurn) -> None:
        with self._state.settling():
            self._state.turns.take(turn)

    def _transition(self, step: OnChangeStep, turn: WaitingTurn) -> Transition[Any]:
        return Transition(
            id=f"{self._name}:{step.name}:{turn.entity}:{turn.version.position.value}:{turn.version.ordinal}",
            key=turn.entity,
            column=turn.column,
            before=turn.before,
            after=turn.after,
            version=turn.version,
            committed_at=turn.committed_at,
        )
