"""Child processes of the demo: started in order, ready when they say so, all stopped at the end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from deltaworks.errors import TerminalError

STOP_WAIT_S = 20.0
"""Services end between two groups, so a second is normal; past this they are killed."""


class ServiceFailedError(TerminalError):
    """A child process ended or did not get ready; the message has the end of its output."""


class Services:
    """The children of one demo. Leaving the block stops them, the first one last, whatever happened."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str]) -> None:
        """Write each child's output to `folder/NAME.log`; children see this environment and ours."""
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        first, *others = self._children or [""]
        # All at once: each ends its work within seconds, one after the other they would take their sum.
        for names in (others, [first] if first else []):
            for name in names:
                self._ask_to_end(name)
            for name in names:
                self._wait_for_end(name)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a child in a process group of its own, so that its own children end with it."""
        with self.output(name).open("wb") as output:
            self._children[name] = subprocess.Popen(  # noqa: S603  every word of the command is ours
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self, name: str, *, until: Callable[[], bool], timeout_s: float) -> None:
        """Return when `until()` is true.

        Raises:
            ServiceFailedError: the child ended first, or time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not until():
            if self._children[name].poll() is not None:
                raise ServiceFailedError(
                    f"{name!r} ended with code {self._children[name].returncode}:\n{self.tail(name)}"
                )
            if time.monotonic() > deadline:
                raise ServiceFailedError(f"{name!r} was not ready after {timeout_s:.0f} s:\n{self.tail(name)}")
            time.sleep(0.05)

    def refuse_ended(self) -> None:
        """Check that all children still run.

        Raises:
            ServiceFailedError: one of them ended.
        """
        for name, child in self._children.items():
            if child.poll() is not None:
                raise ServiceFailedError(f"{name!r} ended with code {child.returncode}:\n{self.tail(name)}")

    def output(self, name: str) -> Path:
        """The file with what the child wrote."""
        return self._folder / f"{name}.log"

    def tail(self, name: str, *, lines: int = 15) -> str:
        """The last lines that the child wrote."""
        text = self.output(name).read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"    {line}" for line in text)

    def _ask_to_end(self, name: str) -> None:
        if self._children[name].poll() is None:
            self._children[name].send_signal(signal.SIGTERM)

    def _wait_for_end(self, name: str) -> None:
        """Wait for `STOP_WAIT_S`, then end what is left of the child's group by force."""
        child = self._children.pop(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_WAIT_S)
        # The group may be gone already, which is what we want.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def answers(url: str) -> Callable[[], bool]:
    """Whether an HTTP server answers at that address, as a question to ask again."""

    def ask() -> bool:
        try:
            return httpx.get(url, timeout=1.0).is_success
        except httpx.TransportError:
            return False

    return ask
