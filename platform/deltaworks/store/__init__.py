"""Store: the lakehouse and the search index that follow the log."""
