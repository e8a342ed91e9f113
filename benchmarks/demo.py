"""The main job's own figures: `make demo` from an empty folder and again, in turn, and commit → searchable."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Figure, arguments, report

ROOT = Path(__file__).resolve().parent.parent


def run_demo(home: Path) -> dict[str, Any]:
    """One demo in a folder of its own; its figures, and how long it took with all that it starts and stops."""
    figures = home / "figures.json"
    config = home / "deltaworks.yaml"
    if not config.exists():
        config.write_text((ROOT / "deltaworks.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "studio.demo", "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "DELTAWORKS_CONFIG": str(config)},
        check=True,
    )
    return {**json.loads(figures.read_text(encoding="utf-8")), "took_s": time.monotonic() - began}


def main() -> int:
    """Repeat first and second runs in turn."""
    options = arguments(__doc__ or "")
    first, second = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="deltaworks-") as folder:
            Path(folder).chmod(0o755)
            first.append(run_demo(Path(folder)))
            second.append(run_demo(Path(folder)))
    runs = first + second
    figures = [
        Figure(name="first run, without the install", values=[run["took_s"] for run in first], unit="s", goal=300),
        Figure(name="second run", values=[run["took_s"] for run in second], unit="s", goal=120),
        Figure(name="commit → searchable, p50", values=[run["lag_p50_s"] for run in runs], unit="s", goal=1),
        Figure(name="commit → searchable, p99", values=[run["lag_p99_s"] for run in runs], unit="s", goal=3),
        Figure(
            name="updates applied",
            values=[run["changes_per_s"] for run in runs],
            unit="changes/s",
            goal=490,
            smaller_is_better=False,
        ),
    ]
    return report("The main job", figures, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
