"""The runner: reads the log, runs an app, and keeps what every crash leaves behind whole.

    log ──► fold ──► process ──► write ──► flush ──► settle ──► log …
            │ synced meanwhile:  │ every sink,        │ not synced: keys
            │ rows, touched      │ in turn            │ done or set back
            │ keys, checkpoint

While sinks flush, a thread of its own waits for them, and the next cycle folds and processes; before it writes, what
was under way is settled. An entity under way is not processed again before, so its documents leave in order.

| the process dies          | then, after a restart                                              |
|---------------------------|--------------------------------------------------------------------|
| before the fold commits   | the same groups are read again                                     |
| before the keys settle    | the touched keys are processed again, from their newest state      |
| at any other place        | nothing is done twice                                              |

A document leaves only after the state it was made from is on disk, so no restart can make an older one.
Under load a cycle simply takes more: a key touched a hundred times is processed once.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import structlog

from deltaworks.config import Config
from deltaworks.errors import RetryableError, TerminalError
from deltaworks.log.change_log import LogEnd, LogReader
from deltaworks.log.membership import Membership, member_name
from deltaworks.log.registry import log_of, open_reader
from deltaworks.log.tables import latest_schemas
from deltaworks.process import metrics
from deltaworks.process.answering import Answering
from deltaworks.process.app import App
from deltaworks.process.backoff import Backoff
from deltaworks.process.burying import Burying
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.client import Settings, open_clients
from deltaworks.process.counting import Counting
from deltaworks.process.direct.ranges import Ranges
from deltaworks.process.direct.reducer import RowsNeededError, is_direct
from deltaworks.process.entities import ENTITIES_PER_CYCLE, Entities
from deltaworks.process.fold import Key
from deltaworks.process.letters import Letter
from deltaworks.process.lineage import LINEAGE_FILE
from deltaworks.process.observing import Observing
from deltaworks.process.pausing import LOOK_EVERY_S, Pause
from deltaworks.process.pipeline import Pipeline
from deltaworks.process.place import take_folder, write_member
from deltaworks.process.report import ProcessReport, Tally
from deltaworks.process.requests import Kind, Requests
from deltaworks.process.schemas import Schemas
from deltaworks.process.shared.sharing import CONFIRM_EVERY_S, Sharing, check_shareable
from deltaworks.process.sink import Sink, SinkAwayError
from deltaworks.process.sinking import Sinking, open_sinks
from deltaworks.process.state import State
from deltaworks.process.telling import Telling
from deltaworks.process.tuning import TUNING_FILE, Tuning
from deltaworks.process.waiting import Standing
from deltaworks.process.watchdog import Watchdog, watched
from deltaworks.schema import TableName, TableSchema

STATE_FILE = "state.sqlite"
"""In the folder of the app."""
POSITION_EVERY_S = 1.0
"""How often sinks hear of a new position when there is nothing to write."""
_LONGEST_WAIT_S = 0.2
_SINK_BACKOFF = Backoff(first_s=0.1, max_s=10.0)

OnProgress = Callable[[int, int], None]
"""Called with the work done and the work known so far: changes to fold plus entities to process."""

logger = structlog.get_logger(__name__)


class Runner:
    """Runs one app; the only runner of it while it is open. Serves one thread at a time."""

    def __init__(
        self,
        *,
        app: App,
        name: str,
        log: LogReader,
        schemas: Mapping[TableName, TableSchema],
        state: State,
        sinks: Sequence[Sink],
        pipeline: Pipeline,
        clients: dict[str, Any],
        loop: asyncio.Runner,
        folder: Path,
        requests: Requests,
        pause: Pause,
        resources: ExitStack,
        step_limit_s: float | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """Use `open`."""
        self.folder = folder
        """Where its state is: the app's folder, or that of one of its members."""
        self._name = name
        self._log = log
        self._state = state
        self._pipeline = pipeline
        self._resources = resources
        self._counting = Counting(name, state=state)
        self._sinking = Sinking(app, sinks, reached=state.checkpoint().reached)
        self._observing = Observing(app, pipeline=pipeline, clients=clients, loop=loop, file=folder / LINEAGE_FILE)
        known = Schemas(app, latest=schemas)
        self._entities = Entities(
            app,
            name=name,
            log=log,
            state=state,
            pipeline=pipeline,
            sinking=self._sinking,
            loop=loop,
            schemas=known,
            counting=self._counting,
            sharing=sharing,
            on_settled=self._observing.when_sampled,
        )
        self._telling = Telling(
            app=app,
            name=name,
            state=state,
            clients=clients,
            loop=loop,
            check=(lambda: None) if sharing is None else sharing.check,
        )
        self._answering = Answering(
            app=name,
            requests=requests,
            state=state,
            forget_answers=self._pipeline.drop_all,
            make_dirty=self._make_dirty,
            at_once={
                Kind.RETRY: lambda keys, _: self.retry_dead(keys),
                Kind.DROP: lambda keys, asked_at: self.drop_dead(keys, until=asked_at),
            },
        )
        self._pause = pause
        self._sharing = sharing
        self.watchdog = Watchdog(name, [*app.steps, *app.reactions], end_after_s=step_limit_s)
        self._burying = Burying(name, folder=folder, state=state, pipeline=pipeline, telling=self._telling)
        self._tuning = Tuning(folder / TUNING_FILE, pipeline.enrichers, app=name)
        self._ranges: Ranges | None = None
        if is_direct(app) and sharing is None and not state.plan.keeps_rows():
            self._ranges = Ranges(
                app,
                log=log,
                state=state,
                pipeline=pipeline,
                sinks=sinks,
                loop=loop,
                check=known.check,
                flush=self._sinking.flush,
            )

    @classmethod
    def open(
        cls,
        app: App,
        *,
        config: Config,
        name: str,
        log: LogReader | None = None,
        membership: Membership | None = None,
    ) -> Self:
        """Take the app `name` of the configuration: its state, its sinks and its clients.

        `log` stands in for the source's log, which only one then reads; `membership` for the group of an app that has
        shares. Close the runner, or use it in a `with`.

        Raises:
            AppHeldError: another process runs it; the message has its id. Members of a group have one each.
            SchemaMismatchError: the tables in the log are not as the app declares them.
            NotShareableError: the app has shares, and cannot be run by several processes.
            TerminalError: the app, its settings or a sink's store cannot be used.
        """
        app.validate()
        settings = config.app(name)
        if settings.source != app.source:
            raise TerminalError(
                f"app {name!r} reads source {app.source!r}, but deltaworks.yaml says {settings.source!r}; "
                f"set apps.{name}.source to {app.source!r}"
            )
        reader = log or open_reader(config, app.source)
        schemas = latest_schemas(reader, wanted=[table.name for table in app.tables])
        app.check(schemas.values(), is_complete=False)
        shares = settings.shares if log is None or membership is not None else None
        if shares is not None:
            check_shareable(app, name=name)
        with ExitStack() as resources:
            folder, lock = take_folder(config.app_folder(name), name, is_shared=shares is not None)
            resources.callback(os.close, lock)
            state = State.open(folder / STATE_FILE, app, shares=shares)
            resources.callback(state.close)
            sinks = open_sinks(app, name=name, config=config, resources=resources)
            loop = resources.enter_context(asyncio.Runner())
            closing = AsyncExitStack()
            resources.callback(lambda: loop.run(closing.aclose()))
            clients = loop.run(open_clients(app, closing, Settings(settings.settings, app=name)))
            sharing = None
            if shares is not None:
                member = membership or log_of(config, app.source).join(name, shares=shares)
                sharing = Sharing(app, name=name, shares=shares, membership=member, state=state, log=reader)
                resources.callback(sharing.close)
                write_member(folder, member_name())
            runner = cls(
                app=app,
                name=name,
                log=reader,
                schemas=schemas,
                state=state,
                sinks=sinks,
                pipeline=Pipeline(app, name=name, clients=clients),
                clients=clients,
                loop=loop,
                folder=folder,
                requests=Requests.of(folder),
                pause=Pause(config.app_folder(name)),
                resources=ExitStack(),
                step_limit_s=settings.step_limit_s,
                sharing=sharing,
            )
            # What is under way ends before the sinks close.
            resources.callback(runner._entities.close)
            if runner._ranges is not None:
                resources.callback(runner._ranges.close)
            runner._resources = resources.pop_all()
        return runner

    @property
    def checkpoint(self) -> Checkpoint:
        """How far the log was taken; what came of it may still be on its way into the sinks."""
        return self._entities.checkpoint

    def close(self) -> None:
        """Close clients and sinks and let another runner in; a second call does nothing."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After an error no step runs again: it may be what failed, and the error is what matters.
            if kind is None and self._observing.is_owed:
                with self.watchdog.watching():
                    self._observing.run()
        finally:
            self.close()

    # Running

    @watched
    def drain(self, *, patience_s: float = 10.0, on_progress: OnProgress | None = None) -> ProcessReport:
        """Process everything that is in the log now.

        Held keys and an absent sink are tried again until nothing got better for `patience_s`; the report says what
        is held then. Of an app with shares this is one member, and it waits for the others.

        Raises:
            RetryableError: a sink was absent for longer than `patience_s`; nothing is lost.
            AppPausedError: a person paused the app; nothing was read.
            SchemaMismatchError: a table changed so that the app cannot read it; nothing after it was read.
        """
        self._pause.check(self._name)
        self._counting.tally = Tally()
        end = self._end()
        self._state.hasten()
        deadline = time.monotonic() + patience_s
        attempt = 0
        others: Mapping[int, int] = {}
        while True:
            before = self._counting.tally.settled
            try:
                worked = self._cycle(up_to_sequence=end.sequence, on_progress=on_progress)
                progress = self._sharing.members_progress() if self._sharing is not None and not worked else others
            except RetryableError as error:
                attempt += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(_delay_s(error, attempt))
                continue
            attempt = 0
            if before != self._counting.tally.settled:
                deadline = time.monotonic() + patience_s
                continue
            is_stuck = time.monotonic() > deadline and not self._state.counts()[Standing.DIRTY]
            if worked and not is_stuck:
                continue
            if progress != others:
                others, deadline = progress, time.monotonic() + patience_s
            next_try = self._state.next_try()
            if next_try is None and others and min(others.values()) < end.sequence and time.monotonic() < deadline:
                time.sleep(_LONGEST_WAIT_S / 4)
                continue
            delay_s = 0.0 if next_try is None else max(0.0, next_try - time.time())
            if next_try is None or time.monotonic() + delay_s > deadline:
                break
            time.sleep(delay_s)
        self._entities.land()
        self._flush_position()
        return self.report()

    @watched
    def follow(self, stop: threading.Event, *, on_progress: OnProgress | None = None) -> ProcessReport:
        """Process the log as it grows until `stop` is set; what has been read by then is finished first.

        A sink or a log that is away for a while is waited for.

        Raises:
            SchemaMismatchError: a table changed so that the app cannot read it; nothing after it was read.
        """
        self._counting.tally = Tally()
        attempt = 0
        while not stop.is_set():
            if self._pause.is_on:
                stop.wait(LOOK_EVERY_S)
            try:
                if self._pause.is_on:
                    self._take_part()
                    continue
                self._entities.wait_for_turn()
                worked = self._cycle(up_to_sequence=self._end().sequence, on_progress=on_progress)
                attempt = 0
                metrics.WAITS.labels(self._name).set(0)
                if not worked:
                    self._wait()
            except RetryableError as error:
                attempt += 1
                metrics.WAITS.labels(self._name).set(1)
                delay_s = _delay_s(error, attempt)
                logger.warning(
                    "app waits", app=self._name, error=str(error), attempt=attempt, delay_s=round(delay_s, 3)
                )
                stop.wait(delay_s)
        try:
            self._entities.land()
        except RetryableError as error:
            logger.warning("app stops before its last documents left", app=self._name, error=str(error))
        return self.report()

    def report(self) -> ProcessReport:
        """What was done since `drain` or `follow` began, and what is held and dead now."""
        counts = self._state.counts()
        return self._counting.tally.report(
            held=counts[Standing.HELD],
            dead=counts[Standing.DEAD] + self._state.turns.dead_count(),
            position=self._sinking.reached,
        )

    def end_when_stuck(self) -> None:
        """Let this process end where a step can be ended in no other way: for a service that is started again.

        The change it is stuck on is kept, and is a dead letter in the next life.
        """
        self.watchdog.give_up = self._burying.end_process

    def skip(self, sequence: int) -> None:
        """Take what the log has up to this group as known: rows are folded, but only what later groups touch leaves.

        For a new state. An app that keeps no rows begins to read there.
        """
        self._entities.skip(sequence, keeps_rows=self._ranges is None)

    # Entities that wait

    def held(self, *, limit: int = 100) -> list[Letter]:
        """Entities that wait for another try, the oldest change first."""
        return self._state.held(limit=limit)

    def dead(self, *, limit: int = 100) -> list[Letter]:
        """Entities and transitions that failed for good, the oldest change first."""
        return self._state.dead(limit=limit)

    def retry_dead(self, keys: Sequence[Key] | None = None) -> int:
        """Let dead letters be processed again, all of them or those of `keys`; how many.

        The next `drain` or `follow` does it: an entity from its newest state, transitions in the order they happened.
        """
        with self._state.folding():
            return self._state.retry(among=[Standing.DEAD], keys=keys) + self._state.turns.retry(keys)

    def drop_dead(self, keys: Sequence[Key] | None = None, *, until: datetime | None = None) -> int:
        """Give up dead letters, all of them or those of `keys`, that were written by `until`; how many.

        An entity's document stays in the sinks as it is until the entity's next change; a transition is never told.
        """
        with self._state.folding():
            count = self._state.drop(keys, until=until or datetime.now(UTC))
        if count:
            logger.warning("dead letters dropped", app=self._name, count=count)
        return count

    def _make_dirty(self, keys: Sequence[Key]) -> int:
        self._state.answers.forget(keys)
        count = self._state.retry(among=list(Standing), keys=keys)
        if self._sharing is not None:
            self._sharing.keep_own()
        return count

    # One cycle

    def _end(self) -> LogEnd:
        end = self._log.end()
        self.checkpoint.check_is_in(end, app=self._name)
        return end

    def _cycle(self, *, up_to_sequence: int, on_progress: OnProgress | None) -> bool:
        self._tuning.refresh()
        self._take_part()
        if self._ranges is not None and self._answering.needs_rows():
            self._keep_rows("entities are to be processed again")
        folded = self._run_range(self._ranges, up_to_sequence) if self._ranges else self._entities.fold(up_to_sequence)
        if self.checkpoint.sequence < self._entities.fold_to:
            # Documents of what is still to be folded have left, so none may be made of what is there now.
            return folded
        if self._answering.is_due():
            self._entities.land()
        is_asked = self._answering.run()
        waiting = self._entities.due()
        is_under_way = self._entities.are_under_way
        if waiting:
            self._entities.process(waiting)
        else:
            self._entities.land_if_durable()
        told = self._telling.run(limit=ENTITIES_PER_CYCLE)
        self._burying.forget()
        self._counting.tally.turns += told.taken
        if not waiting and not folded:
            self._flush_position(every_s=POSITION_EVERY_S)
        if on_progress is not None:
            done = self._counting.tally.changes + self._counting.tally.entities
            left = self._log.end().offset - self.checkpoint.offset + self._state.counts()[Standing.DIRTY]
            on_progress(done, done + left)
        return bool(folded or waiting or is_under_way or told.tried or is_asked)

    def _take_part(self) -> None:
        if self._sharing is not None:
            self._sharing.turn()
            self._sharing.confirm(every_s=CONFIRM_EVERY_S)

    def _run_range(self, ranges: Ranges, up_to_sequence: int) -> bool:
        try:
            ranged = ranges.run(
                replace(self._entities.checkpoint, reached=self._sinking.reached), up_to_sequence=up_to_sequence
            )
        except RowsNeededError as error:
            self._keep_rows(str(error))
            return True
        if ranged is None:
            return False
        self._entities.checkpoint = ranged.checkpoint
        self._counting.changes(ranged.change_count)
        self._counting.outcome(ranged.outcome, ranged.entity_count)
        self._counting.lags(ranged.committed_at, ranged.appended_at)
        self._observing.when_sampled()
        return True

    def _keep_rows(self, reason: str) -> None:
        """Go over to the plan that keeps every row, from the start of the log."""
        logger.warning("app keeps rows from now on", app=self._name, reason=reason)
        self._entities.fold_to = max(self.checkpoint.sequence, self._state.plan.reading_to())
        self._state.keep_rows(fold_to=self._entities.fold_to)
        self._ranges = None
        self._entities.checkpoint = self._state.checkpoint()

    def _flush_position(self, *, every_s: float = 0.0) -> None:
        """Tell the sinks of a position that came with nothing to write; not while they flush."""
        if self._entities.are_under_way:
            return
        is_news = self.checkpoint.position > self._sinking.reached and not self._state.counts()[Standing.DIRTY]
        if is_news and time.monotonic() - self._sinking.flushed_at >= every_s:
            self._sinking.flush(self.checkpoint.position)
            with self._state.settling():
                self._state.save_reached(self._sinking.reached)

    def _wait(self) -> None:
        next_try = self._state.next_try()
        timeout_s = _LONGEST_WAIT_S if next_try is None else min(_LONGEST_WAIT_S, max(0.0, next_try - time.time()))
        self._log.wait(after_sequence=self.checkpoint.sequence, timeout_s=timeout_s)


def _delay_s(error: RetryableError, attempt: int) -> float:
    """How long to wait after failed try `attempt`: by our own patience, or longer where the sink asked for it."""
    asked_s = error.after_s if isinstance(error, SinkAwayError) else None
    return max(_SINK_BACKOFF.delay_s(attempt), asked_s or 0.0)
