"""DuckDB's extensions, unpacked from their Python wheels: no network, at any time.

DuckDB looks for an extension by name in its `extension_directory`. The wheels carry the signed
files; `provide` puts them there once, so every DuckDB of the project (ours, dbt's) finds them.
"""

import fcntl
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import duckdb
from duckdb_extensions import import_extension

from deltaworks.errors import TerminalError

_FILE_NAMES = {"sqlite": "sqlite_scanner", "postgres": "postgres_scanner"}
"""A wheel's name on the left, DuckDB's own name of the extension where it differs on the right."""


class ExtensionMissingError(TerminalError):
    """A DuckDB extension that this lake needs has no wheel here."""


def provide(connection: duckdb.DuckDBPyConnection, names: Iterable[str], *, folder: Path) -> None:
    """Load extensions into a connection whose `extension_directory` is `folder`.

    Safe when several processes start at once; the first one unpacks, about 0.1 s and 35 MB each.

    Raises:
        ExtensionMissingError: no wheel of that extension is installed for this DuckDB.
    """
    for name in names:
        extension = _FILE_NAMES.get(name, name)
        if not any(folder.glob(f"*/*/{extension}.duckdb_extension.info")):
            _unpack(connection, name, folder=folder)
        try:
            connection.load_extension(extension)
        except duckdb.Error as error:
            raise ExtensionMissingError(
                f"cannot load DuckDB extension {extension!r} from {str(folder)!r}: {error}; remove that folder"
                " and start again, it is unpacked anew"
            ) from error


def _unpack(connection: duckdb.DuckDBPyConnection, name: str, *, folder: Path) -> None:
    # The lock keeps two first starts from writing the same file; DuckDB itself writes the `.info`
    # file last, so its presence above means that the extension is whole.
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            import_extension(name, con=connection)
        except (ImportError, duckdb.Error) as error:
            wheel = f"duckdb-extension-{name}=={metadata.version('duckdb')}"
            raise ExtensionMissingError(
                f"cannot provide DuckDB extension {name!r}: no wheel has it; install it with `pip install {wheel}`"
            ) from error
