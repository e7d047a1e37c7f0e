"""The results of the benchmark, as text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.meters import Reading

GORGON, CANVAS, COUNTERS = "Gorgon", "Celery, canvas", "Celery, counters"
SIDES = (GORGON, CANVAS, COUNTERS)
_COLUMNS = ("wall ms", "CPU ms", "commits", "WAL bytes", "messages", "Redis commands", "Redis bytes")
_FORMATS = ("{:.3f}", "{:.3f}", "{:.3f}", "{:.0f}", "{:.3f}", "{:.2f}", "{:.0f}")


@dataclass(frozen=True, slots=True)
class Figure:
    """One result.  `limit`: the maximum to meet the target; None if there is no target."""

    name: str
    value: float
    shown: str
    limit: float | None = None
    limit_shown: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.limit is None or self.value <= self.limit

    @property
    def verdict(self) -> str:
        """`met`, `MISSED`, or empty if there is no target."""
        return "" if self.limit is None else "met" if self.met else "MISSED"


@dataclass
class Cell:
    """A shape at one size, with the blocks of each side."""

    shape: str
    steps: int
    blocks: dict[str, list[Reading]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`chain 1,000`."""
        return f"{self.shape} {self.steps:,}"

    def typical(self, side: str) -> list[float]:
        """Return the median of each column of a side's blocks."""
        return [median(getattr(block, name) for block in self.blocks[side]) for name in Reading.__slots__]

    def cpu(self, side: str) -> float:
        """Return the CPU milliseconds per step of a side."""
        return median(block.cpu for block in self.blocks[side])


def ratios(cells: Sequence[Cell], limit: float) -> list[Figure]:
    """Return Gorgon's CPU as a share of raw Celery's; the target compares with Celery's own canvas if that was
    measured.
    """
    found = []
    for cell in cells:
        for side in (CANVAS, COUNTERS):
            if side in cell.blocks:
                counts = side == CANVAS or CANVAS not in cell.blocks
                ratio = cell.cpu(GORGON) / cell.cpu(side)
                found.append(
                    Figure(
                        f"CPU per step, {cell.title}: Gorgon / {side}",
                        ratio,
                        f"{ratio:.2f}",
                        limit if counts else None,
                        f"≤ {limit}" if counts else "",
                    )
                )
    return found


def growth(cells: Sequence[Cell], limit: float) -> list[Figure]:
    """Return for each shape how Gorgon's CPU per step at the largest size compares with that at the smallest."""
    found = []
    for shape in dict.fromkeys(cell.shape for cell in cells):
        sizes = sorted((cell for cell in cells if cell.shape == shape), key=lambda cell: cell.steps)
        small, large = sizes[0], sizes[-1]
        if small is not large:
            ratio = large.cpu(GORGON) / small.cpu(GORGON)
            name = f"CPU per step, {shape}: at {large.steps:,} / at {small.steps:,}"
            found.append(Figure(name, ratio, f"{ratio:.2f}", limit, f"≤ {limit}"))
    return found


def costs(cells: Sequence[Cell], *, markdown: bool) -> str:
    """Return the table of the cost of a step."""
    rows = [
        [cell.title, side, *[how.format(value) for how, value in zip(_FORMATS, cell.typical(side), strict=True)]]
        for cell in cells
        for side in SIDES
        if side in cell.blocks
    ]
    return _table(["per step", "", *_COLUMNS], rows, markdown=markdown, left=2)


def figures(found: Sequence[Figure], *, markdown: bool) -> str:
    """Return the table of results and targets."""
    rows = [[figure.name, figure.shown, figure.limit_shown, figure.verdict] for figure in found]
    return _table(["", "result", "target", ""], rows, markdown=markdown, left=1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool, left: int) -> str:
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    padded = [
        [
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [head, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])
