"""`python -m bench` (`make bench`): what a step costs on Gorgon and on raw Celery, and how fast Gorgon is.

Exits with 0 only where every target is reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import latency, meters, report, shapes
from bench.meters import Meter, Reading
from bench.report import CANVAS, COUNTERS, GORGON, Cell, Figure
from bench.sides import SLOTS, WORKERS, Gorgon, Raw, measured, servers
from gorgon_common import queues

RATIO = 0.5
GROWTH = 1.3
SIZES = (100, 1_000, 10_000)
ROUNDS = 3
ROUNDS_SECONDS = 420
"""After this many seconds, each side runs one more block of each cell instead of three, so that a slow machine
finishes.
"""
LARGE = 10_000
"""From this size on, a block of raw Celery takes up to a minute, so one of each is run among Gorgon's blocks."""
LONGEST_CHAIN = 1_000
"""Longer chains are not measured on Celery: their messages grow quadratically."""

Run = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 and 1,000 steps, one block each: about a minute")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every block and figure to a file")
    parser.add_argument("--shapes", default=",".join(_SHAPES), help="only these, separated by commas")
    parser.add_argument("--sizes", help="only these, separated by commas")
    asked = parser.parse_args(arguments)
    sizes = [int(size) for size in asked.sizes.split(",")] if asked.sizes else list(SIZES[: 2 if asked.quick else 3])
    since = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-bench-")))
        both = stack.enter_context(servers())
        gorgon = Gorgon(both, folder)
        stack.callback(gorgon.close)
        raw = Raw(both, folder)
        stack.callback(raw.close)
        cells, found, versions = _measure(gorgon, raw, asked.shapes.split(","), sizes, 1 if asked.quick else ROUNDS)
        _say("2,000 slow steps")
        found.append(latency.slow_steps(gorgon))
    found = [*report.ratios(cells, RATIO), *report.growth(cells, GROWTH), *found]
    _show(cells, found, versions, time.monotonic() - since, markdown=asked.markdown)
    if asked.json:
        asked.json.write_text(json.dumps(_plain(cells, found, versions), indent=1))
    return 0 if all(figure.met for figure in found) else 1


def _measure(
    gorgon: Gorgon, raw: Raw, names: Sequence[str], sizes: Sequence[int], rounds: int
) -> tuple[list[Cell], list[Figure], str]:
    """Measure everything that needs both workers of each side."""
    both = gorgon.servers
    served = [[queues.CONTROL, latency.FIRST], [queues.CONTROL, latency.SECOND]]
    assert len(served) == WORKERS
    with gorgon.workers(served) as ours, raw.workers() as theirs, contextlib.ExitStack() as stack:
        mine = Meter(both.gorgon_url, both.redis_url, ours.pids, [os.getpid()])
        stack.callback(mine.close)
        other = Meter(both.raw_url, both.raw_redis_url, theirs.pids, [os.getpid()])
        stack.callback(other.close)
        versions = f"{meters.machine()}; {mine.versions()}"
        _say(versions)
        gauges = {GORGON: mine, CANVAS: other, COUNTERS: other}
        until = time.monotonic() + ROUNDS_SECONDS
        cells = [
            _cell(Cell(name, steps), _sides(gorgon, raw, name, steps), gauges, rounds, until)
            for steps in sizes
            for name in names
        ]
        _say("latencies")
        found = [*latency.hops(gorgon), latency.first_step(gorgon), latency.creation(gorgon)]
        found += [latency.memory(ours), *latency.messages(gorgon)]
    return cells, found, versions


def _cell(cell: Cell, sides: dict[str, Run], gauges: dict[str, Meter], rounds: int, until: float) -> Cell:
    """Measure a shape at a size in alternating blocks."""
    for number in range(rounds):
        for side, run in sides.items():
            if number == 0 or (time.monotonic() < until and (side == GORGON or cell.steps < LARGE)):
                cell.blocks.setdefault(side, []).append(measured(gauges[side], run, cell.steps))
    _say(f"{cell.title:18}" + ", ".join(f"{side} {cell.cpu(side):.3f}" for side in sides) + " CPU ms a step")
    return cell


def _sides(gorgon: Gorgon, raw: Raw, name: str, steps: int) -> dict[str, Run]:
    """Return the functions that run a shape once on each side."""
    deps = _SHAPES[name](steps)
    plan = shapes.map_reduce(steps) if name == "map-reduce" else shapes.plan(deps, f"bench-{name}")
    found: dict[str, Run] = {GORGON: lambda: gorgon.run(plan)}
    if name != "dag" and (name != "chain" or steps <= LONGEST_CHAIN):
        found[CANVAS] = lambda: raw.canvas(name, steps)
    found[COUNTERS] = lambda: raw.counters(deps)
    return found


_SHAPES: dict[str, Callable[[int], shapes.Deps]] = {
    "chain": shapes.chain,
    "fan-out": shapes.fan_out,
    "dag": shapes.dag,
    "map-reduce": shapes.fan_in,
}


def _show(cells: Sequence[Cell], found: Sequence[Figure], versions: str, seconds: float, *, markdown: bool) -> None:
    print(f"\n{versions}; {WORKERS} worker processes of {SLOTS} slots on each side; {seconds:.0f} s\n")
    print(report.costs(cells, markdown=markdown), end="\n\n")
    print(report.figures(found, markdown=markdown), end="\n\n")
    missed = [figure.name for figure in found if not figure.met]
    aimed = sum(figure.limit is not None for figure in found)
    print(f"{aimed - len(missed)} of {aimed} targets are met." + "".join(f"\nMISSED: {name}" for name in missed))


def _plain(cells: Sequence[Cell], found: Sequence[Figure], versions: str) -> dict[str, object]:
    return {
        "versions": versions,
        "cells": [
            {
                "shape": cell.shape,
                "steps": cell.steps,
                "blocks": {side: [_block(block) for block in blocks] for side, blocks in cell.blocks.items()},
            }
            for cell in cells
        ],
        "figures": [{**asdict(figure), "met": figure.met} for figure in found],
    }


def _block(block: Reading) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(block).items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
