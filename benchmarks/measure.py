"""What every benchmark shares: repeats, medians, a table, and a list of figures as JSON."""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity; `goal` is a bound on the median, an upper one where `smaller_is_better`."""

    name: str
    values: Sequence[float]
    unit: str
    goal: float | None = None
    smaller_is_better: bool = True

    @property
    def median(self) -> float:
        """The middle of the repeats."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal holds; `None` without one."""
        if self.goal is None:
            return None
        return self.median <= self.goal if self.smaller_is_better else self.median >= self.goal


def arguments(description: str, *, repeats: int = 3) -> argparse.Namespace:
    """The options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help="at least three")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser.parse_args()


def report(title: str, figures: Sequence[Figure], *, path: Path | None) -> int:
    """Print the table, write the JSON; the number of goals that were missed."""
    table = Table("figure", "median", "spread", "goal", "met", title=title)
    for figure in figures:
        bound = (
            "" if figure.goal is None else f"{'≤' if figure.smaller_is_better else '≥'} {figure.goal:g} {figure.unit}"
        )
        table.add_row(
            figure.name,
            f"{figure.median:,.3g} {figure.unit}",
            f"{min(figure.values):,.3g} – {max(figure.values):,.3g} (n={len(figure.values)})",
            bound,
            {True: "yes", False: "NO", None: ""}[figure.met],
        )
    Console().print(table)
    if path is not None:
        rows = [
            {
                "name": figure.name,
                "value": figure.median,
                "unit": figure.unit,
                "goal": figure.goal,
                "met": figure.met,
                "repeats": list(figure.values),
            }
            for figure in figures
        ]
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return sum(figure.met is False for figure in figures)
