"""Enrichment: services asked in batches, within limits, and not more often than needed.

enrich   ids of many entities gathered into few calls, and a failed call narrowed to who is at fault
limits   calls at once, and calls a second
breaker  a service that keeps failing is left alone for a while
cache    answers kept in memory, for a while, or until a looked-up row changes
changed  `when=changed(…)`: asked again only when one of some columns changed
answers  the answers kept for that, in the app's state
"""
