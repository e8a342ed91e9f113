"""A process that has imported everything, from which runs start at once.

    python -m resources.run_worker [MODULE …]

    daemon ── run's arguments ─► socket ─► fork ─► the run, in a process of its own

A run that starts afresh imports for 10 to 20 seconds of processor time before its first step:
Dagster, dbt, Great Expectations. A fork of this process has all of that already. Like the code
server, it holds the definitions as they were when it started. Where it does not listen, runs start
as Dagster starts them (`resources.run_launcher`), only slower.

Forking is safe because nothing runs here beside the loop: no lake, no database, no channel to a
code server is open. What libraries start at import (BLAS, the allocator of Arrow, DuckDB's default
instance) either comes back after a fork or is not used by a run, which opens instances of its own.
"""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from deltaworks.errors import InvariantError, TerminalError

PRELOADED = ("assets.definitions", "great_expectations", "dbt.cli.main", "dbt.adapters.duckdb.connections")
"""What a load imports, directly or not."""

STOP_WAIT_S = 10.0
"""An interrupted run ends its statement and says so in Dagster; one that takes longer is left to end by itself."""

_REQUEST_TIMEOUT_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MAX_REQUEST_BYTES = 1 << 20


class WorkerListensError(TerminalError):
    """Another worker has the socket."""


class NotForkableError(InvariantError):
    """A thread of Python's runs beside the loop, and a fork would lose it."""


class Stopped(BaseException):
    """SIGTERM or SIGINT came. Not an error, hence no `Exception`."""


def main() -> int:
    """Preload, listen, and fork until a signal comes."""
    from dagster import DagsterInstance  # noqa: PLC0415  # the launcher imports this file for `ask` alone

    with DagsterInstance.get() as instance:
        place = Path(str(instance.run_launcher.inst_data.config_dict["worker_socket"]))  # type: ignore[attr-defined]  # ours, see dagster.yaml
    _preload(sys.argv[1:] or PRELOADED)
    with _listening(place) as listener:
        print(f"runs start from this process, at {str(place)!r}", flush=True)  # noqa: T201  # for who runs the service
        _serve(listener)
    return 0


def ask(place: Path, arguments: str) -> int | None:
    """Have the worker at `place` execute a run; the process id of the run, `None` where no worker listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_REQUEST_TIMEOUT_S)
        try:
            connection.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            return None
        connection.sendall(arguments.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(32)
    return int(answer) if answer else None


def _preload(modules: Sequence[str]) -> None:
    with warnings.catch_warnings():
        # What libraries say of each other's imports is not for who runs this.
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)
    gc.collect()
    # Objects that the collector never touches stay shared between this process and its runs.
    gc.freeze()


@contextlib.contextmanager
def _listening(place: Path) -> Iterator[socket.socket]:
    """The socket, for this user only: whoever may write to it may run code."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(place)) == 0:
            raise WorkerListensError(f"cannot listen at {str(place)!r}: another worker does; stop it first")
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(place))
        finally:
            os.umask(before)
        listener.listen()
        try:
            yield listener
        finally:
            place.unlink(missing_ok=True)


def _serve(listener: socket.socket) -> None:
    """Fork for every request; a signal ends the loop and interrupts the runs."""
    children: set[int] = set()
    for each in _SIGNALS:
        signal.signal(each, _stop)
    # Finished runs are waited for between requests, so that none stays a zombie for long.
    listener.settimeout(1.0)
    try:
        while True:
            _reap(children)
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(_REQUEST_TIMEOUT_S)
                    _answer(listener, connection, children)
    except Stopped:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        _interrupt(children)


def _answer(listener: socket.socket, connection: socket.socket, children: set[int]) -> None:
    try:
        arguments = _read(connection)
    except OSError:
        # Who asked has gone, and with it the wish for a run; Dagster reports the launch that failed.
        return
    if threading.active_count() > 1:
        raise NotForkableError(f"cannot fork beside the threads {[each.name for each in threading.enumerate()]!r}")
    with warnings.catch_warnings():
        # Python 3.12 counts the libraries' own threads; see the top of this file.
        warnings.simplefilter("ignore", DeprecationWarning)
        # A signal must find either this process or a run with handlers of its own, nothing in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        child = os.fork()
    if child == 0:
        _execute(arguments, listener, connection)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    children.add(child)
    with contextlib.suppress(OSError):
        connection.sendall(str(child).encode())


def _read(connection: socket.socket) -> str:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
        if sum(map(len, parts)) > _MAX_REQUEST_BYTES:
            raise OSError("the request does not end")
    return b"".join(parts).decode()


def _execute(arguments: str, *inherited: socket.socket) -> None:
    """Execute the run in this process, and end it. Never returns into the parent's loop."""
    code = 1
    try:
        for each in _SIGNALS:
            signal.signal(each, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for each_socket in inherited:
            each_socket.close()
        # What Dagster's launchers for containers run; there is no public way in.
        from dagster._cli.api import execute_run_command  # noqa: PLC0415

        execute_run_command.main(args=[arguments], prog_name="run", standalone_mode=False)
        code = 0
    except BaseException as error:
        print(f"the run ended with {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: threads that the fork left behind must not be waited for.
        os._exit(code)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise Stopped


def _reap(children: set[int]) -> None:
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0]:
            children.discard(child)


def _interrupt(children: set[int]) -> None:
    """Interrupt every run, and give them a moment to say so."""
    _reap(children)
    for child in children:
        os.kill(child, signal.SIGINT)
    deadline = time.monotonic() + STOP_WAIT_S
    while children and time.monotonic() < deadline:
        time.sleep(0.05)
        _reap(children)


if __name__ == "__main__":
    sys.exit(main())
