"""Runs the cases with "steps": services that are held, killed and restarted while the source changes."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import yaml
from connector import STEPS, Connector, Hold
from data_case import PUBLICATION, SOURCE, config_of, home, prepare, tables_setting
from judging import Outcome, judge, shown, source_differences
from lag import LagWatch
from outcome import Sink, read_events
from place import SETTINGS, Database, fresh_database, started_server, until

from deltaworks import operate
from deltaworks.config import Config
from deltaworks.log.dump_requests import DumpOutcome, DumpRequest, DumpRequests
from deltaworks.log.holder import holder_of
from deltaworks.log.local import LOCK_FILE, LocalLogReader
from deltaworks.position import START, Lsn
from deltaworks.testing.postgres import PostgresServer

START_S = 60.0
KILL_AWAITED_S = 15.0
"""How long a start waits for the kill that is to come before it."""

IDLE_KILL_S = 3.0
"""How long a kill is awaited of a reader that has everything: there is nothing left at which it could be killed."""


class CannotRunError(Exception):
    """The runner has no way to do what a case asks."""


def run_step_case(case: Mapping[str, Any], server: PostgresServer) -> list[str]:
    """Run a case; every difference from what it expects."""
    with ExitStack() as stack:
        if any("cluster" in step for step in case["steps"]):
            # A case that loses its server has one of its own.
            server = stack.enter_context(started_server(server.binaries))
        database = stack.enter_context(fresh_database(server))
        run = _Run(case, database, stack.enter_context(home()))
        stack.callback(run.close)
        run.all_steps()
        return judge(case["expect"], run.outcome())


@dataclass(slots=True)
class _Run:
    case: Mapping[str, Any]
    database: Database
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    connectors: list[Connector] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    begin_offset: int = 0
    restart_offset: int | None = None
    dump: str | None = None
    _lag: LagWatch | None = None
    _killed_pid: int | None = None
    _holds_at_start: list[Hold] = field(default_factory=list)

    def all_steps(self) -> None:
        prepare(self.case, self.database)
        tables = [str(table) for table in self.database.user_tables(roots=True)]
        self.settings = {"tables": tables_setting(self.case, self.database) if "publication" in self.case else tables}
        self._mend_tables_without_key()
        steps = list(_flat(self.case["steps"]))
        for place, step in enumerate(steps):
            if "at" in step:
                continue
            if "start" in step:
                self._await_kills()
            # What happens at a hook is prepared before the step that leads there.
            holds = [self._as_hold(at) for at in _ats_after(steps, place)]
            if "start" in step:
                self._holds_at_start = holds
            else:
                for hold in holds:
                    self.connectors[-1].hold(hold)
            self._do(step)

    def _mend_tables_without_key(self) -> None:
        """Do what `deltaworks check` says of them: without it, the server would refuse their updates."""
        for finding in operate.check(self._config(), SOURCE):
            if "replica identity full" in finding.mend:
                self.database.run(finding.mend.partition(";")[0])

    def outcome(self) -> Outcome:
        """What came out, once everything that lives has caught up."""
        self.database.stop_load()
        if self._is_alive():
            operate.capture(self._config(), SOURCE)
        events = read_events(self._log)
        sink = Sink()
        for event in events:
            sink.apply(event)
        headers = list(LocalLogReader(self._log).headers_backwards())[::-1]
        self.facts["epochs"] = [header.epoch for header in headers]
        self.facts["connector"] = "running" if self._is_alive() else "failed"
        self.facts["dump_ends"] = self.dump is not None and self._dump_outcome() is not None
        self.facts["log_lag_s"] = self._lag.longest_s if self._lag is not None else None
        if self.restart_offset is not None:
            after = {event.commit for event in events if event.op == "r" and event.offset >= self.restart_offset}
            self.facts["chunks_read_after_restart"] = len(after)
        return Outcome(
            database=self.database,
            sink=sink,
            events=[event for event in events if event.offset >= self.begin_offset],
            reports=self._reports(),
            facts=self.facts,
        )

    def close(self) -> None:
        if self._lag is not None:
            self._lag.stop()
        for connector in self.connectors:
            connector.stop()
        if self.database.standby is not None:
            self.database.close()
            self.database.standby.stop()

    # Steps.

    def _do(self, step: Mapping[str, Any]) -> None:
        name = next((name for name in _STEPS if name in step), None)
        if name is None:
            raise CannotRunError(f"no way to run the step {dict(step)}")
        _STEPS[name](self, step)

    def _start(self, step: Mapping[str, Any]) -> None:
        count = 2 if str(step["start"]).endswith("x2") else 1
        self.settings |= {"tables": [str(table) for table in step["tables"]]} if "tables" in step else {}
        is_restart = bool(self.connectors)
        if is_restart:
            self.restart_offset = LocalLogReader(self._log).end().offset
        for _ in range(count):
            self.connectors.append(self._connector())
            until(
                lambda: self._holder() is not None or not self._is_alive(), what="a capture service", timeout_s=START_S
            )
        if not is_restart:
            self._await_first_dump()
            self.begin_offset = LocalLogReader(self._log).end().offset

    def _dump(self, step: Mapping[str, Any]) -> None:
        wanted = step["dump"]
        if "where" in wanted or "id" in wanted:
            raise CannotRunError(f"no way to ask for the dump {wanted}")
        self.begin_offset = LocalLogReader(self._log).end().offset
        keys = [tuple(str(part) for part in key.values()) for key in wanted.get("keys", ())]
        request = DumpRequest.new(map(str, wanted["tables"]), keys=keys)
        self._requests().ask(request)
        self.dump = request.id

    def _sql(self, step: Mapping[str, Any]) -> None:
        statements = [step["sql"]] if isinstance(step["sql"], str) else step["sql"]
        for statement in statements:
            text = statement.replace("{slot}", self.database.name)
            if "{marks}" in text:
                # Marks are messages in the log, not rows; writing one that is not ours is the attack that is left.
                text = "select pg_logical_emit_message(true, 'deltaworks.mark', 'garbage')"
            prefix = f"{step['conn']}: " if "conn" in step else ""
            self.database.run(prefix + text, session=step.get("session"))

    def _sql_async(self, step: Mapping[str, Any]) -> None:
        self.database.run_later(step["sql_async"], connection=step.get("conn", "async"))

    def _stop(self, _step: Mapping[str, Any]) -> None:
        for connector in self.connectors:
            connector.stop()

    def _kill(self, _step: Mapping[str, Any]) -> None:
        self.connectors[-1].kill()

    def _kill_active(self, _step: Mapping[str, Any]) -> None:
        self._killed_pid = self._holder()
        for connector in self.connectors:
            if connector.process.pid == self._killed_pid:
                connector.kill()

    def _load(self, step: Mapping[str, Any]) -> None:
        for pattern, action in _LOADS:
            if found := re.fullmatch(pattern, step["load"]):
                action(self, *found.groups())
                return
        raise CannotRunError(f"no way to put the load {step['load']!r}")

    def _stop_load(self, _step: Mapping[str, Any]) -> None:
        self.database.stop_load()

    def _wait(self, step: Mapping[str, Any]) -> None:
        text = str(step["wait"])
        if text.startswith("seconds "):
            # Up to that long: what is waited for is looked at by the check that follows.
            self._wait_for_lag(float(text.split()[1]))
            return
        conditions = [self._condition(part.strip()) for part in text.split(" or ")]
        timeout_s = float(step.get("max_seconds", 60))
        until(lambda: any(condition() for condition in conditions), what=text, timeout_s=timeout_s)

    def _cluster(self, _step: Mapping[str, Any]) -> None:
        server = self.database.server
        self.database.standby = server.start_standby(server.folder.with_name("standby"), settings=SETTINGS)

    def _promote(self, _step: Mapping[str, Any]) -> None:
        self.database.promote()
        self.database.stop_load()

    def _check(self, step: Mapping[str, Any]) -> None:
        if "lag of the slot" not in str(step["check"]):
            raise CannotRunError(f"no way to check {step['check']!r}")
        self.facts["slot_lag_mb"] = self._slot_lag_mb()

    # Loads.

    def _update_all(self, per_second: str, seconds: str) -> None:
        table = str(self.settings["tables"][0])
        ids = [row[0] for row in self.database.rows(f"select id from {table} order by id")]
        batch = 50
        lag = self._lag = LagWatch(self._log)

        def update(connection: psycopg.Connection[Any], number: int) -> None:
            first = number * batch % len(ids)
            connection.execute(
                f"update {table} set n = n + 1 where id = any(%s)",
                [ids[first : first + batch]],
            )
            row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
            lag.note(Lsn.parse(row[0]) if row else START)

        self.database.load(update, per_second=int(per_second) / batch, seconds=float(seconds))

    def _insert_steadily(self, per_second: str) -> None:
        table = str(self.settings["tables"][0])

        def insert(connection: psycopg.Connection[Any], number: int) -> None:
            connection.execute(f"insert into {table} values (%s, 'load', 0)", [number + 1])

        self.database.load(insert, per_second=float(per_second), seconds=600)

    def _fill(self, megabytes: str, table: str) -> None:
        rows = int(megabytes) * 960
        filled = f"insert into {table} (pad) select repeat(md5(i::text), 32) from generate_series(1, {rows}) i"
        self.database.connection("load").execute(filled)  # type: ignore[call-overload]

    def _fill_elsewhere(self, megabytes: str) -> None:
        with psycopg.connect(self.database.server.dsn(), autocommit=True) as connection:
            connection.execute("create table if not exists conformance_load (pad text)")
            connection.execute(
                "insert into conformance_load select repeat(md5(i::text), 32) from generate_series(1, %s) i",
                [int(megabytes) * 960],
            )
            connection.execute("drop table conformance_load")

    def _write_wal(self, megabytes: str) -> None:
        self._fill_elsewhere(megabytes)
        with psycopg.connect(self.database.server.dsn(), autocommit=True) as connection:
            for _ in range(3):
                connection.execute("select pg_switch_wal()")
                connection.execute("checkpoint")

    # Conditions.

    def _condition(self, text: str) -> Callable[[], bool]:
        if found := re.fullmatch(r"event (\S+) op (\w)", text):
            return lambda: self._has_event(*found.groups())
        if found := re.fullmatch(r"dump_waiting (\d+)s", text):
            deadline = time.monotonic() + int(found.group(1))
            return lambda: time.monotonic() > deadline
        known: dict[str, Callable[[], bool]] = {
            "dump_done": lambda: self._ending() == "done",
            "dump_refused": self._is_refused,
            "dump_failed_clear": self._is_refused,
            "caught_up": self._is_caught_up,
            "connector_failed": lambda: not self._is_alive(),
            # Rows may be equal before the gap is even noticed, and deletes are owed after the last of them came.
            "repaired": lambda: (
                self._is_alive() and self._is_equal() and bool(self._reports().get("gap_repaired_by_dump"))
            ),
            "new_active": lambda: self._holder() not in (None, self._killed_pid),
        }
        if text not in known:
            raise CannotRunError(f"no way to wait for {text!r}")
        return known[text]

    def _has_event(self, place: str, op: str) -> bool:
        table, _, key = place.partition("/")
        return any(
            event.op == op and shown(event.table) == table and ",".join(map(str, event.key.values())) == key
            for event in read_events(self._log)
        )

    def _is_caught_up(self) -> bool:
        if not self._is_alive():
            raise RuntimeError(f"the capture service ended: {self.connectors[-1].said[-500:]}")
        operate.capture(self._config(), SOURCE)
        return True

    def _is_equal(self) -> bool:
        is_open = LocalLogReader(self._log).end().progress.get("gaps")
        return not is_open and not list(source_differences(self.outcome()))

    def _is_refused(self) -> bool:
        """Whether the dump was refused, or the whole source with a message that says what to mend."""
        return self._ending() == "failed" or (not self._is_alive() and "to mend on the server" in self._said())

    def _said(self) -> str:
        return self.connectors[-1].said if self.connectors else ""

    def _ending(self) -> str | None:
        outcome = self._dump_outcome()
        return outcome.ending.value if outcome is not None else None

    # What there is.

    @property
    def _log(self) -> Path:
        return self._config().log_folder(SOURCE)

    def _config(self) -> Config:
        return config_of(self.database, self.folder, **self.settings)

    def _connector(self) -> Connector:
        chunk_rows = next(
            (step["dump"]["chunk_size"] for step in _flat(self.case["steps"]) if "chunk_size" in step.get("dump", {})),
            None,
        )
        source = {
            "kind": "postgres",
            "dsn": self.database.dsn,
            "slot": self.database.name,
            "publication": PUBLICATION,
            **self.settings,
            **({"chunk_rows": chunk_rows} if chunk_rows else {}),
        }
        path = self.folder / "deltaworks.yaml"
        path.write_text(yaml.safe_dump({"home": str(self.folder), "sources": {SOURCE: source}}), encoding="utf-8")
        return Connector(path, SOURCE, output=self.folder / "connector.log", log=self._log, holds=self._holds_at_start)

    def _requests(self) -> DumpRequests:
        return DumpRequests(self._config().dump_folder(SOURCE))

    def _dump_outcome(self) -> DumpOutcome | None:
        return self._requests().outcome(self.dump) if self.dump is not None else None

    def _holder(self) -> int | None:
        return holder_of(self._log / LOCK_FILE)

    def _is_alive(self) -> bool:
        return any(connector.is_alive for connector in self.connectors)

    def _await_first_dump(self) -> None:
        def is_done() -> bool:
            dumps = LocalLogReader(self._log).end().progress.get("dumps", {})
            return not self._is_alive() or (bool(dumps) and all(each["state"] == "done" for each in dumps.values()))

        until(is_done, what="the first dump", timeout_s=START_S)
        if self._is_alive():
            operate.capture(self._config(), SOURCE)

    def _await_kills(self) -> None:
        """A start comes after the kill that was to happen before it."""
        for connector in self.connectors:
            for hold in connector.holds:
                self._await_hold(connector, hold)
            if connector.is_alive and connector.holds:
                connector.kill()

    def _await_hold(self, connector: Connector, hold: Hold) -> None:
        patience_s = KILL_AWAITED_S if hold.row is None else IDLE_KILL_S
        deadline = time.monotonic() + patience_s
        # A service that is dead by its hold may not be followed before all of the hold is done.
        while not hold.done.wait(0.05) and (hold.is_reached or connector.is_alive):
            if not hold.is_reached and time.monotonic() > deadline:
                return

    def _as_hold(self, at: Mapping[str, Any]) -> Hold:
        step = STEPS.get(at["at"])
        if step is None:
            raise CannotRunError(f"no step {at['at']!r}; known: {', '.join(STEPS)}")
        row = at.get("row")

        def act() -> None:
            for each in at["do"]:
                self._do(each)
                if "kill" in each and row is not None:
                    self.connectors[-1].cut_last_group(row=int(row))

        return Hold(step=step, nth=int(at.get("chunk", 1)), act=act, row=row)

    def _wait_for_lag(self, seconds: float) -> None:
        # The server notes running transactions every 15 s, twice before a slot may move: on a full machine, later.
        deadline = time.monotonic() + max(seconds, 90)
        while time.monotonic() < deadline and self._slot_lag_mb() >= 16:
            time.sleep(0.2)

    def _slot_lag_mb(self) -> float:
        (lag,) = self.database.rows(
            "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), least(restart_lsn, confirmed_flush_lsn)) / 1048576.0 "
            "from pg_replication_slots where slot_name = %s",
            [self.database.name],
        )[0]
        return float(lag)

    def _reports(self) -> dict[str, Any]:
        reports: dict[str, Any] = {"no_key": "has no primary key" in self._said()}
        outcome = self._dump_outcome()
        if outcome is not None:
            table = outcome.tables[0] if hasattr(outcome, "tables") else next(iter(outcome.rows), "")
            reports["missing_keys"] = [f"{table.removeprefix('public.')}/{','.join(key)}" for key in outcome.missing]
            reports["unknown_tables"] = list(outcome.unknown_tables)
            reports["no_key"] |= "key" in (outcome.error or "")
        gaps = [header.progress.get("gaps") for header in LocalLogReader(self._log).headers_backwards()]
        if any(gaps):
            is_repaired = not gaps[0]
            reports |= {"gap": True, "slot_lost": True}
            reports |= {"gap_repaired_by_dump": is_repaired, "slot_lost_repaired_by_dump": is_repaired}
        return reports


def _flat(steps: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The steps with every `repeat` written out."""
    for step in steps:
        if "repeat" not in step:
            yield step
            continue
        found = re.fullmatch(r"(\w+)=(\d+)\.\.(\d+)", step["repeat"])
        if found is None:
            raise CannotRunError(f"no way to repeat {step['repeat']!r}")
        name, first, last = found.groups()
        for number in range(int(first), int(last) + 1):
            for each in _flat(step["do"]):
                yield {key: number if value == name else value for key, value in each.items()}


def _ats_after(steps: Sequence[Mapping[str, Any]], place: int) -> Iterator[Mapping[str, Any]]:
    for step in steps[place + 1 :]:
        if "at" not in step:
            return
        yield step


_STEPS: Mapping[str, Callable[[_Run, Mapping[str, Any]], None]] = {
    "start": _Run._start,
    "dump": _Run._dump,
    "sql": _Run._sql,
    "sql_async": _Run._sql_async,
    "stop": _Run._stop,
    "kill": _Run._kill,
    "kill_active": _Run._kill_active,
    "stop_load": _Run._stop_load,
    "cluster": _Run._cluster,
    "promote": _Run._promote,
    "load": _Run._load,
    "wait": _Run._wait,
    "check": _Run._check,
}

_LOADS: Sequence[tuple[str, Callable[..., None]]] = (
    (r"continuous updates of all ids, (\d+) rows per second, for (\d+) s", _Run._update_all),
    (r"(\d+) inserts per second", _Run._insert_steadily),
    (r"(\d+) MB of inserts into (\w+)", _Run._fill),
    (r"(\d+) MB of inserts in another database", _Run._fill_elsewhere),
    (r"(\d+) MB of WAL, then CHECKPOINT", _Run._write_wal),
)
