"""Serve: HTTP services over the stores."""
