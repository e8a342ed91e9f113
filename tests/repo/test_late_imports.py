"""What runs all the time imports what it uses, and nothing of the stages behind it."""

import subprocess
import sys

from deltaworks import operate

SERVICE = """
import sys
from deltaworks import cli, operate
from deltaworks.capture.memory import leave_pandas_out
from deltaworks.capture.postgres.warm import compile_loops
operate.follow_capture, operate.metrics_server
leave_pandas_out()
compile_loops()
unused = {"pandas", "scipy", "duckdb", "sqlglot", "deltaworks.store", "deltaworks.lineage", "deltaworks.gate"}
print(*sorted(unused & set(sys.modules)))
"""


def test_capture_service_imports_nothing_of_the_lake_and_no_pandas_or_scipy() -> None:
    found = subprocess.check_output([sys.executable, "-c", SERVICE], text=True)
    assert found.split() == []


def test_pandas_can_be_imported_after_arrow_was_told_of_none() -> None:
    code = "from deltaworks.capture.memory import leave_pandas_out; leave_pandas_out(); import pandas; print(pandas.NA)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["<NA>"]


def test_every_name_of_operate_is_there_when_it_is_asked_for() -> None:
    late = {name for names in operate._LATE.values() for name in names}
    assert late <= set(operate.__all__)
    for name in operate.__all__:
        assert callable(getattr(operate, name))
    for name in late:
        assert getattr(operate, name).__name__ == name
