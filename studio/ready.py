"""Before `make up`: is every port free, is dbt's manifest there, and where to look once all runs."""

import socket
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

import dagster as dg
from rich.console import Console

from deltaworks.config import Config
from deltaworks.errors import DeltaworksError, TerminalError
from resources import environment
from studio.database import DEFAULT_PORT

DAGSTER_PORT = 3000
CODE_PORT = 4266
"""As in the Procfile."""

out = Console()


class PortTakenError(TerminalError):
    """A port that a service needs is in use."""


def ports(config: Config) -> Mapping[str, int]:
    """What listens where."""
    talent = urlsplit(str(config.app("movie_search").settings["talent_url"]))
    return {
        "the studio's PostgreSQL": DEFAULT_PORT,
        "the Talent Service": talent.port or 80,
        "the search page": config.serve.port,
        "Dagster": DAGSTER_PORT,
        "Dagster's code server": CODE_PORT,
    }


def refuse_taken(wanted: Mapping[str, int]) -> None:
    """Check all ports at once.

    Raises:
        PortTakenError: with every port that is in use.
    """
    taken = [f"{port} ({name})" for name, port in wanted.items() if is_taken(port)]
    if taken:
        raise PortTakenError(
            f"cannot start: in use on 127.0.0.1: {', '.join(taken)}; "
            "stop what uses them, perhaps another `make up` or `make demo`"
        )


def prepare_dagster() -> None:
    """Parse the dbt project, and create Dagster's storage, before several processes would do both at once."""
    # An import of seconds, which what cannot start should not wait for, and the database's start can hide.
    from resources.dbt import prepared_project  # noqa: PLC0415

    prepared_project()
    with dg.DagsterInstance.from_config(str(environment.ROOT)) as instance:
        instance.get_runs_count()
        instance.all_instigator_state()


def main() -> int:
    """Prepare, and print the addresses."""
    try:
        config = environment.config()
        refuse_taken(ports(config))
    except DeltaworksError as error:
        out.print(f"up: {error}", style="red", markup=False, highlight=False)
        return 1
    prepare_dagster()
    out.print(f"search   http://{config.serve.host}:{config.serve.port}\nDagster  http://127.0.0.1:{DAGSTER_PORT}")
    return 0


def is_taken(port: int) -> bool:
    """Whether something listens on that port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
