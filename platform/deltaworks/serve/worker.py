"""Runs an ASGI application as a process that serves and a worker that answers.

    serving process ── starts, restarts, stops ──► worker: the application, on one port
           │                                          │
           └── killed with -9: the kernel kills the worker too, so the port is free at once

For applications that only read: their worker may die at any moment.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from deltaworks.errors import TerminalError

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent dies."""


class PortInUseError(TerminalError):
    """Another process listens on the configured port."""


def serve(build: Callable[[], Any], *, host: str, port: int, setting: str, log_level: LogLevels) -> None:
    """Serve the ASGI application that `build` makes until SIGTERM or Ctrl-C.

    `build` runs in the worker, so it has to be picklable. `setting` is what a person changes to have another port.

    Raises:
        PortInUseError: somebody else listens there; found out before anything starts.
    """
    _check_port(host, port, setting)
    server = Granian(
        f"{__name__}:serve",
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        websockets=False,
        log_level=log_level,
        workers_kill_timeout=5,
    )
    server.serve(target_loader=partial(_build_in_worker, build, os.getpid()), wrap_loader=False)


def _build_in_worker(build: Callable[[], Any], parent: int) -> Any:  # Any: an ASGI application has no one type
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The kernel sends nothing for a parent that died before it was asked to.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    return build()


def _check_port(host: str, port: int, setting: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does it: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(
                f"cannot serve on {host!r} port {port!r}: {error.strerror}; stop the process that listens there, "
                f"or choose another with {setting}"
            ) from error
