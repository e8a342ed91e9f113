"""Run conformance cases against a real server.

    python tests/conformance/cdc.py tests/conformance/cases/postgres.yaml --source postgres

A case that cannot be run counts as failed, by name. The last line is `N passed, N failed`.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# As a program it finds its own folder; the servers of the tests lie beside that.
sys.path.insert(0, str(Path(__file__).parents[1]))

import structlog
import yaml
from data_case import run_data_case
from place import SERVERS, started_server
from step_case import run_step_case

from deltaworks.testing.postgres import PostgresServer

SOURCES = {"postgres": "pg"}
"""Sources by the name on the command line, with the name that case files have for them."""


def read_cases(file: Path, *, source: str) -> list[dict[str, Any]]:
    """The cases of a file that are for this source."""
    cases = yaml.safe_load(file.read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if case["source"] == SOURCES[source]]


def run_case(case: Mapping[str, Any], server: PostgresServer) -> list[str]:
    """Run one case; every difference from what it expects, and why it could not be run."""
    try:
        if "change" in case:
            return run_data_case(case, server)
        if "steps" in case:
            return run_step_case(case, server)
    except Exception as error:
        if os.environ.get("CONFORMANCE_TRACEBACK"):
            traceback.print_exc()
        return [f"ended with {type(error).__name__}: {error}"]
    return ["cannot run it: it has neither 'change' nor 'steps'"]


def main() -> int:
    """Run the cases of a file and print how they went."""
    options = _options()
    cases = [
        case
        for case in read_cases(options.file, source=options.source)
        if not options.case or case["id"] in options.case
    ]
    failed = 0
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with started_server(SERVERS[options.server]) as server:
        for case, differences in _run_all(cases, server):
            failed += bool(differences)
            print(f"{'FAILED' if differences else 'passed'}  {case['id']}  {case['title']}", flush=True)
            for difference in differences:
                print(f"        {difference}", flush=True)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _run_all(cases: Iterable[dict[str, Any]], server: PostgresServer) -> Iterator[tuple[dict[str, Any], list[str]]]:
    for case in cases:
        yield case, run_case(case, server)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="cases in the form of cases/postgres.yaml")
    parser.add_argument("--source", choices=SOURCES, required=True)
    parser.add_argument("--server", choices=SERVERS, default="embedded")
    parser.add_argument("--case", action="append", metavar="ID", help="run only this one; may be given again")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
