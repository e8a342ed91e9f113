"""The `deltaworks` command."""
