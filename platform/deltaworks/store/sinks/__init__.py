"""Sinks that write to servers: each one file, each declared by its spec and a name under `connections:`.

PostgresTable  rows of a table, guarded by versions, one transaction for each flush
Webhook        one signed POST for each document
"""

from deltaworks.store.sinks.postgres_table import PostgresTable
from deltaworks.store.sinks.webhook import Webhook

__all__ = ["PostgresTable", "Webhook"]
