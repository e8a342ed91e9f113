"""Deltaworks: every derived store in step with its source, provably."""
