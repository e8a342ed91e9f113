"""Closed segments of a local log, kept for good in an object store: written by `upload`, read through `cache`."""
