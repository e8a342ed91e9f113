"""An app that several processes run: accounts with the sum of their bookings, in a table of another schema.

What it tells of names is a line in a file: the account, the change's position and ordinal, and the name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.store.sinks.postgres_table import PostgresTable

bank = Source("bank")


class Account(TypedDict):
    name: str


class Booking(TypedDict):
    amount: int


class Balance(TypedDict):
    account_id: int
    name: str
    balance: int


booking = bank.table("booking", schema=Booking)
balances = App("balances", key="account_id", sources=[bank.table("account", schema=Account), booking])


@balances.transform
def document(account: Entity[Account]) -> Balance:
    return {
        "account_id": account.key,
        "name": account.after["name"],
        "balance": sum(each["amount"] for each in account.rows(booking)),
    }


@balances.client
def file(settings: Mapping[str, Any]) -> Path:
    return Path(settings["told"])


@balances.on_change("name")
def tell(turn: Transition[Account], file: Path) -> None:
    # One write to the end of a file is one line, whoever else writes.
    with file.open("a") as told:
        told.write(f"{turn.key} {turn.version.position.value} {turn.version.ordinal} {turn.after['name']}\n")


balances.sink(PostgresTable("mart.balance", connection="warehouse", schema=Balance))
