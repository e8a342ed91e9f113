"""An app whose process dies at named steps and comes back, over a log and a sink that stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from process.material import Feed, TableSink, config_in

from deltaworks import faults
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import App
from deltaworks.process.runner import Runner

CRASH_POINTS = (
    "process.after_read",
    "process.before_fold_commit",
    "process.after_fold",
    "process.after_write",
    "process.after_flush",
    "process.after_checkpoint",
)
_SHARED_MEMORY = Path("/dev/shm")


class Crash(BaseException):  # not an Exception, so that nothing in between can take it for a fault
    pass


class Mortal:
    """`feed` commits to the log; `app` has the one sink, which takes no document back; `runner` is the life of now."""

    def __init__(self, folder: Path) -> None:
        self.log = MemoryLog()
        self.feed = Feed(self.log.writer())
        self.sink = TableSink(folder / "sink.sqlite")
        self.config = config_in(folder)

    def live(self, app: App) -> None:
        """Begin the first life."""
        self.app = app
        app.sink(self.sink)
        self.runner = self.open()

    def open(self) -> Runner:
        return Runner.open(self.app, config=self.config, name="films", log=self.log.reader())

    def reopen(self) -> None:
        self.runner.close()
        self.runner = self.open()

    def step(self, event: Any) -> None:
        """Run, die at a step, or end and begin anew."""
        match event:
            case ("drain",):
                self.runner.drain(patience_s=0)
            case ("reopen",):
                self.reopen()
            case ("crash", point, pass_count):
                self.crash(point, pass_count)

    def crash(self, point: str, pass_count: int) -> None:
        """Die when that point is reached for the `pass_count`-th time, if it is, and come back."""
        left = pass_count

        def die() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash(point)

        faults.arm(point, die)
        try:
            self.runner.drain(patience_s=0)
        except Crash:
            self.reopen()
        finally:
            faults.disarm()


@contextmanager
def quick_folder() -> Iterator[Path]:
    """In memory where that is possible: a process dies here, the machine does not."""
    with TemporaryDirectory(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as folder:
        yield Path(folder)
