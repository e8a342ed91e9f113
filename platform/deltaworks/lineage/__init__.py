"""Lineage: which columns a column is made of."""
