"""Gate: expectations and releases."""
