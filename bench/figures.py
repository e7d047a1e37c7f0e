"""Figures with targets, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One figure.  `aim`: the minimum to reach (a maximum if `below`), None if there is no target.

    `unit`: percent (of 1), ratio, seconds or count.
    """

    name: str
    value: float
    unit: str
    aim: float | None = None
    below: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        if self.aim is None:
            return True
        return self.value <= self.aim if self.below else self.value >= self.aim

    def written(self, value: float) -> str:
        """Return a value in the figure's unit."""
        match self.unit:
            case "percent":
                return f"{value:.2%}"
            case "ratio":
                return f"{value:.3f}"
            case "seconds":
                return f"{value:.2f} s"
        return f"{value:,.1f}".removesuffix(".0")

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """The cells of its row in the table."""
        aim = "" if self.aim is None else f"{'≤' if self.below else '≥'} {self.written(self.aim)}"
        verdict = "" if self.aim is None else "met" if self.met else "MISSED"
        return self.name, self.written(self.value), aim, verdict, self.note


def table(found: Sequence[Target]) -> str:
    """Return the figures as text."""
    rows = [("", "measured", "target", "", ""), *(target.row for target in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    )
