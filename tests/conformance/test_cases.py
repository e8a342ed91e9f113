"""Every case of `cases/postgres.yaml`, run by the runner that users have too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cdc import read_cases, run_case

from deltaworks.testing.postgres import PostgresServer

NOT_YET: Mapping[str, str] = {}
"""Cases that capture does not pass; one that passes may not stand here."""

CASES = read_cases(Path(__file__).parent / "cases" / "postgres.yaml", source="postgres")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case(case: Mapping[str, Any], conformance_server: PostgresServer) -> None:
    differences = run_case(case, conformance_server)
    assert bool(differences) == (case["id"] in NOT_YET), differences
