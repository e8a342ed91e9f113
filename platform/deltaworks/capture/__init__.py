"""Capture: committed changes of a source, as Arrow change batches. Contract in `source.py`."""
