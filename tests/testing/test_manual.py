"""The Python of the manual's pages on apps runs as it stands there."""

import re
from pathlib import Path
from types import ModuleType

import pytest

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how-to"


@pytest.mark.parametrize("page", ["test-an-app.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (HOW_TO / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    module = ModuleType(page)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}:{number}", "exec"), module.__dict__)
