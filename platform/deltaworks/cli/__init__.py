"""The `deltaworks` command. `commands` has its words; a group of words has a file of its own."""

from deltaworks.cli.commands import app, main

__all__ = ["app", "main"]
