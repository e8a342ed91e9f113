"""The folder of an app and who holds it: one runner per folder, and a folder for each member on one machine.

home/process/<app>/            state, lock        the only runner, or a machine's first member
home/process/<app>/member-1/   state, lock        the next member

The folder of a member says in `member` whose state it is; the name stays when that one died.
"""

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from deltaworks.errors import TerminalError
from deltaworks.log.holder import holder_of
from deltaworks.process.room import opening

MEMBER_FILE = "member"
"""In the folder of a member."""
MOST_MEMBERS = 64
"""Members of one app on one machine; one for each core is plenty."""


class AppHeldError(TerminalError):
    """Another process runs the app; there is one runner per app, or per share of it."""


def take_folder(folder: Path, name: str, *, is_shared: bool) -> tuple[Path, int]:
    """The folder for a runner's state and the descriptor of its lock; close it to let go.

    Raises:
        AppHeldError: another process has it; the message has its id.
    """
    if not is_shared:
        return folder, take_lock(folder, name)
    for number in range(MOST_MEMBERS):
        own = folder / f"member-{number}" if number else folder
        try:
            return own, take_lock(own, name)
        except AppHeldError:
            continue
    raise AppHeldError(f"cannot run app {name!r}: {MOST_MEMBERS} processes run it on this machine; stop some first")


def member_folders(folder: Path, *, is_shared: bool) -> list[Path]:
    """Where the runners of an app on this machine keep their states, those that do not run now included."""
    if not is_shared:
        return [folder]
    numbered = [folder / f"member-{number}" for number in range(1, MOST_MEMBERS)]
    return [folder, *(each for each in numbered if each.exists())]


def own_folder(folder: Path, *, is_shared: bool) -> Path:
    """The one that this process holds, of the folders of an app's members here; the first where it holds none."""
    held = (each for each in member_folders(folder, is_shared=is_shared) if holder_of(each / "lock") == os.getpid())
    return next(held, folder) if is_shared else folder


def write_member(folder: Path, name: str) -> None:
    """Say whose state is in this folder; only once nothing there is another's."""
    file = folder / MEMBER_FILE
    with opening(f"the name of member {name!r}", file):
        draft = file.with_name(f".{MEMBER_FILE}")
        draft.write_text(name, encoding="utf-8")
        draft.replace(file)


def read_member(folder: Path) -> str | None:
    """Whose state is in this folder; `None` where no member of a group had it."""
    try:
        return (folder / MEMBER_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def take_lock(folder: Path, name: str) -> int:
    """The descriptor of the folder's lock, with this process's id in it.

    Raises:
        AppHeldError: another process holds it; the message has its id.
        StateFullError: there is no room for the id.
    """
    file = folder / "lock"
    with ExitStack() as opened, opening(f"the lock of app {name!r}", file):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        opened.callback(os.close, descriptor)
        _lock(descriptor, name)
        opened.pop_all()
    return descriptor


def _lock(descriptor: int, name: str) -> None:
    try:
        # The kernel lets go of the lock when the process ends, however it ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise AppHeldError(f"cannot run app {name!r}: process {holder} runs it; stop that one first") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
