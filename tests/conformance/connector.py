"""The product's capture service as a child process whose named steps can be held or killed from outside.

runner ──"go"──►  ┌───────────┐
runner ◄─ step ── │ connector │ ──► deltaworks capture SOURCE
                  └───────────┘
"""

import contextlib
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from servers import forked

from deltaworks import faults

STEPS = {
    "dump.after_low": "dump.before_select",
    "dump.after_select": "dump.after_select",
    "dump.after_high": "dump.after_mark",
    "dump.after_emit": "dump.after_emit",
    "sink.after_write": "log.after_write",
    "ack.before": "capture.after_append",
}
"""The steps of case files, and what stands for them here.

A dump needs no low mark, so what a case does there happens before the chunk is read. The sink is the
change log, which takes whole groups: a row of `sink.after_write` tells how much of the group reaches the disk.
"""

WATCHED = (*STEPS.values(), "log.before_write")


@dataclass(slots=True)
class Hold:
    """What to do when a step is reached for the `nth` time from now."""

    step: str
    nth: int
    act: Callable[[], None]
    row: int | None = None
    seen: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_reached(self) -> bool:
        return self.seen >= self.nth


class Connector:
    """One capture service. Not thread-safe, apart from the actions of its holds."""

    def __init__(self, config: Path, source: str, *, output: Path, log: Path, holds: Sequence[Hold] = ()) -> None:
        self.holds = list(holds)
        self._log = log
        self._output = output
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self._socket = ours
        self.process = forked.start(
            "capture",
            source,
            "--config",
            str(config),
            output=output,
            folder=config.parent,
            before=tell_steps,
            arguments=[theirs],
        )
        theirs.close()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """Everything that this and earlier services printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def hold(self, hold: Hold) -> None:
        """Act at a step, once."""
        with self._lock:
            self.holds.append(hold)

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """Ask it to end, as a supervisor does."""
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self._socket.close()

    def cut_last_group(self, *, row: int) -> None:
        """Leave only a part of what the killed service wrote without a sync, as a crash of the machine does."""
        for file in self._files():
            before = self._sizes.get(file, 0)
            if file.stat().st_size > before:
                with file.open("r+b") as opened:
                    opened.truncate(before + (file.stat().st_size - before) * (row % 50) // 50)

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("r") as lines:
            for line in lines:
                self._reached(json.loads(line))
                self._socket.sendall(b"go\n")

    def _reached(self, step: str) -> None:
        if step == "log.before_write":
            self._sizes = {file: file.stat().st_size for file in self._files()}
        with self._lock:
            due = [hold for hold in self.holds if hold.step == step]
            for hold in due:
                hold.seen += 1
            due = [hold for hold in due if hold.is_reached and not hold.done.is_set()]
        for hold in due[:1]:
            try:
                hold.act()
            finally:
                hold.done.set()

    def _files(self) -> list[Path]:
        return list(self._log.glob("*.segment"))


def tell_steps(line: socket.socket) -> None:
    """In the child: tell of every step, and wait for the answer."""
    answers = line.makefile("r")

    def tell(step: str) -> None:
        line.sendall(json.dumps(step).encode() + b"\n")
        answers.readline()

    for step in dict.fromkeys(WATCHED):
        faults.arm(step, partial(tell, step))
