"""Sinks that write to servers: each one file, each declared by its spec and a name under `connections:`.

PostgresTable    rows of a table, guarded by versions, one transaction for each flush
MySqlTable       the same in MySQL and MariaDB
OpenSearchIndex  a search index behind an alias, with tombstones, rebuilt without downtime
RedisCache       cache entries that may end by themselves
KafkaTopic       one record for each document, keyed by its entity
Webhook          one signed POST for each document
"""

from deltaworks.store.sinks.kafka_topic import KafkaTopic
from deltaworks.store.sinks.mysql_table import MySqlTable
from deltaworks.store.sinks.opensearch_index import OpenSearchIndex
from deltaworks.store.sinks.postgres_table import PostgresTable
from deltaworks.store.sinks.redis_cache import RedisCache
from deltaworks.store.sinks.webhook import Webhook

__all__ = ["KafkaTopic", "MySqlTable", "OpenSearchIndex", "PostgresTable", "RedisCache", "Webhook"]
