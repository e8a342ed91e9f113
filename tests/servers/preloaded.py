"""What the process that tests fork commands from has imported and compiled."""

from deltaworks import cli, operate  # noqa: F401
from deltaworks.capture.postgres.warm import compile_loops
from deltaworks.operate import app, dump, lake, lease, log, progress  # noqa: F401

lease.warm_up()
compile_loops()
