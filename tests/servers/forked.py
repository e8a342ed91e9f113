"""The product's commands as processes of their own, forked from one that has imported everything.

An import of the engine takes most of two seconds, and a test of crashes starts it a dozen times. What runs
is the command itself, with its own process id, signals and memory; only its imports were done before.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

Hook = Callable[..., None]
"""Called in the child before the command runs; like its arguments it has to be picklable."""

_CONTEXT: list[ForkServerContext] = []


class Child:
    """A running command, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid: int = process.pid or 0

    @property
    def returncode(self) -> int | None:
        """How it ended, negative for a signal; `None` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    *command: str,
    output: Path,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    before: Hook | None = None,
    arguments: Sequence[object] = (),
) -> Child:
    """`deltaworks COMMAND` in `folder`, writing to the end of `output`."""
    output.touch()
    process = _context().Process(
        target=_run,
        args=(command, output, folder, dict(os.environ) | dict(environment or {}), before, arguments),
        # What a failed test leaves behind ends with the tests.
        daemon=True,
    )
    process.start()
    return Child(process)


def call(function: Hook, *arguments: object, output: Path) -> Child:
    """A function in a process of its own, writing to the end of `output`; both have to be picklable."""
    output.touch()
    process = _context().Process(target=_call, args=(function, arguments, output), daemon=True)
    process.start()
    return Child(process)


def _context() -> ForkServerContext:
    if not _CONTEXT:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["servers.preloaded"])
        with _importable(Path(__file__).parents[1]):
            forkserver.ensure_running()
        _CONTEXT.append(context)
    return _CONTEXT[0]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the forking process import from a folder: before Python 3.14 it is not given our `sys.path`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _call(function: Hook, arguments: Sequence[object], output: Path) -> None:
    _write_to(output)
    function(*arguments)


def _write_to(output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _run(
    command: Sequence[str],
    output: Path,
    folder: Path,
    environment: Mapping[str, str],
    before: Hook | None,
    arguments: Sequence[object],
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _write_to(output)
    sys.argv = ["deltaworks", *command]
    if before is not None:
        before(*arguments)
    from deltaworks import cli  # noqa: PLC0415 - imported by the process that this one was forked from

    cli.main()
