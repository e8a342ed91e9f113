"""Everything that starts a run."""
