"""An app that several processes run: accounts with the sum of their bookings, in a table of another schema."""

from typing import TypedDict

from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
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


balances.sink(PostgresTable("mart.balance", connection="warehouse", schema=Balance))
