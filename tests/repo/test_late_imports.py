"""What runs all the time imports what it uses, and nothing of the stages behind it."""

import subprocess
import sys

from deltaworks import operate

SERVICE = """
import sys
from deltaworks import cli, operate
operate.follow_capture, operate.metrics_server
print(*sorted({"duckdb", "sqlglot", "deltaworks.store", "deltaworks.lineage", "deltaworks.gate"} & set(sys.modules)))
"""


def test_capture_service_imports_nothing_of_the_lake() -> None:
    found = subprocess.check_output([sys.executable, "-c", SERVICE], text=True)
    assert found.split() == []


def test_every_name_of_operate_is_there_when_it_is_asked_for() -> None:
    late = {name for names in operate._LATE.values() for name in names}
    assert late <= set(operate.__all__)
    for name in operate.__all__:
        assert callable(getattr(operate, name))
    for name in late:
        assert getattr(operate, name).__name__ == name
