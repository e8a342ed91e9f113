"""A real file system of a few megabytes, for a process of its own: when it is full, the kernel says so.

    unshare -rm ──► tmpfs of that size on a folder, which only the process sees ──► the command
    the test    ──► the root of that process in /proc: sees and frees what it has there

Needs root, or user namespaces for everybody (`sysctl kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu):
without either a test that asks for one fails and says so.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MOUNT = 'mount -t tmpfs -o "size=$SMALL_DISK_BYTES" tmpfs "$SMALL_DISK" && exec "$@"'


@dataclass(frozen=True)
class SmallDisk:
    """The folder as the process calls it, and the process."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def seen(self) -> Path:
        """The same folder as the test finds it, while the process runs."""
        return Path("/proc", str(self.process.pid), f"root{self.folder}")

    def free_bytes(self) -> int:
        """What is left."""
        disk = os.statvfs(self.seen)
        return disk.f_bavail * disk.f_frsize


@contextmanager
def on_small_disk(
    *command: str, folder: Path, size_bytes: int, output: Path, environment: Mapping[str, str]
) -> Iterator[SmallDisk]:
    """Run Python, with a file system of that size mounted on `folder` for it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"SMALL_DISK": str(folder), "SMALL_DISK_BYTES": str(size_bytes)}
    with output.open("ab") as file:
        process = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", sys.executable, *command],
            env={**os.environ, **environment, **own},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield SmallDisk(folder, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
