"""The PostgreSQL source: pgoutput over a logical replication slot."""
