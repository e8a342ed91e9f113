"""Several `deltaworks process` of one app, over Kafka into one table: killed and joined, it ends as the source is."""

import random
import signal
import threading
from pathlib import Path

import psycopg
import pytest
import yaml
from flows.chain import ROOT, wait
from servers import forked
from servers.kafka import KafkaCluster
from servers.postgres import Database

from deltaworks import config as configuration
from deltaworks import operate

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

ACCOUNTS = 50
EXPECTED = """
    select account_id, name, coalesce(sum(amount), 0) from account left join booking using (account_id)
    group by account_id, name order by account_id
"""


def write(database: Database, stop: threading.Event) -> None:
    """Book, move bookings to other accounts, and close accounts."""
    chance = random.Random(6)
    with database.connect() as connection:
        while not stop.wait(0.005):
            account, other = chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS)
            match chance.randrange(6):
                case 0:
                    connection.execute("delete from account where account_id = %s", [account])
                case 1:
                    connection.execute(
                        "insert into account values (%s, %s) "
                        "on conflict (account_id) do update set name = excluded.name",
                        [account, f"name {chance.random()}"],
                    )
                case 2:
                    connection.execute("update booking set account_id = %s where account_id = %s", [other, account])
                case _:
                    connection.execute(
                        "insert into booking (account_id, amount) values (%s, %s)", [account, chance.randrange(100)]
                    )


def told(file: Path) -> dict[int, list[tuple[tuple[int, int], str]]]:
    """What was told of each account, in that order: the change's version and the name."""
    found: dict[int, list[tuple[tuple[int, int], str]]] = {}
    for line in file.read_text().splitlines():
        account, position, ordinal, name = line.split(maxsplit=3)
        found.setdefault(int(account), []).append(((int(position), int(ordinal)), name))
    return found


def newest(file: Path) -> dict[int, str]:
    return {account: lines[-1][1] for account, lines in sorted(told(file).items())}


def changed_names(database: Database) -> dict[int, str]:
    """Of every account there is: its name if anything was told of it, which is when it is not as it was dumped."""
    return {
        account: name
        for account, name in database.rows("select account_id, name from account order by 1")
        if name != f"name {account}"
    }


def check_order(file: Path) -> None:
    """What is told for the first time is newer than all that was told of its account before."""
    for account, lines in told(file).items():
        first = list(dict.fromkeys(version for version, _ in lines))
        assert first == sorted(first), f"account {account} went back"


def test_members_with_a_real_sink_end_as_the_source(
    database: Database, small_kafka: KafkaCluster, tmp_path: Path
) -> None:
    database.execute(
        "create table account (account_id int primary key, name text not null)",
        "create table booking (id int generated always as identity primary key, account_id int not null, "
        "amount int not null)",
        f"insert into account select n, 'name ' || n from generate_series(0, {ACCOUNTS - 1}) n",
        "create schema mart",
    )
    log = {"kind": "kafka", "brokers": small_kafka.brokers, "topics": f"bank.{database.name}", "member_timeout_s": 6}
    log |= {"replication_factor": 1, "allow_weak_topics": True}
    source = {"kind": "postgres", "dsn": database.dsn, "tables": ["account", "booking"], "log": log}
    source |= {"slot": database.name, "publication": database.name}
    settings = {
        "home": str(tmp_path / "home"),
        "sources": {"bank": source},
        "apps": {
            "balances": {
                "module": "flows.shared_app:balances",
                "source": "bank",
                "shares": 6,
                "settings": {"told": str(tmp_path / "told.txt")},
            }
        },
        "connections": {"warehouse": {"kind": "postgres", "dsn": database.dsn}},
    }
    path = tmp_path / "deltaworks.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = configuration.load(path, environment={})
    children: list[forked.Child] = []

    def start(name: str, *command: str) -> forked.Child:
        child = forked.start(
            *command, output=tmp_path / f"{name}.log", folder=ROOT, environment={"DELTAWORKS_CONFIG": str(path)}
        )
        children.append(child)
        return child

    def said(text: str, *names: str) -> bool:
        return all(text in (tmp_path / f"{name}.log").read_text() for name in names)

    def outputs() -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-3_000:]}" for file in sorted(tmp_path.glob("*.log")))

    # What a dump shows is no transition, so it is over before there are any.
    operate.capture(config, "bank")
    stop = threading.Event()
    writing = threading.Thread(target=write, args=(database, stop))
    start("capture", "capture", "bank")
    members = [start(name, "process", "balances") for name in ("a", "b")]
    writing.start()
    try:
        wait(lambda: said("shares are taken", "a", "b"), what="shares of both members")
        members[0].kill()
        start("c", "process", "balances")
        wait(lambda: said("shares are taken", "c"), what="shares of the third member")
        members[1].send_signal(signal.SIGTERM)
        assert members[1].wait(60) == 0
        stop.set()
        writing.join()
        expected = database.rows(EXPECTED)

        def is_there() -> bool:
            try:
                return sorted(database.rows("select account_id, name, balance from mart.balance")) == expected
            except psycopg.errors.UndefinedTable:
                return False

        wait(is_there, what="the balances of the source in the sink")
        # A run beside the members waits until every share is done.
        done = operate.process(config, "balances")
        assert done.counts["held"] == done.counts["dead"] == 0
        assert is_there()
        names = changed_names(database)
        assert names
        wait(lambda: names.items() <= newest(tmp_path / "told.txt").items(), what="the newest name of each account")
        check_order(tmp_path / "told.txt")
        audit = operate.audit(config, "bank")
        assert audit.is_balanced
        assert sum(hop.hop.startswith("app balances") for hop in audit.hops) > 1
        assert sum(each.left for each in audit.entities["balances"]) == len(expected)
        # What the table loses by somebody's hand is named over all members, and made anew.
        lost, reverted = expected[0][0], expected[1][0]
        database.execute(
            f"delete from mart.balance where account_id = {lost}",
            f"update mart.balance set _commit = 1 where account_id = {reverted}",
        )
        (incident,) = operate.audit(config, "bank").found
        assert {int(key) for (key,) in incident.loss.keys["public.account"]} == {lost, reverted}
        operate.repair(config, "bank")
        operate.process(config, "balances")
        assert is_there()
        assert operate.audit(config, "bank").is_balanced
    except BaseException:
        print(outputs())  # noqa: T201  # pytest shows it where the test fails
        raise
    finally:
        stop.set()
        writing.join()
        for child in children:
            child.kill()
            child.wait()
