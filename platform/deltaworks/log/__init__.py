"""The change log: the durable, ordered, replayable history. Contract in `change_log.py`."""
