"""`python -m bench.forecast`: the estimates of plans compared with runs of all bundled workflows on the sandbox.

Each workflow is planned and run several times, each time by a fresh `gorgon` process on one database: first without
history, then with more and more of it.  The sandbox has a different seed each time, so replies differ.  Printed for
each round: how many of (cost, input tokens, output tokens, time) lie between low and p95, and how many exceed worst.

Negative control: the same check for plans with halved figures.  It must fail, otherwise the check detects nothing.

Exit code 0 only if at least 95 % of the costs and of all figures lie inside, none exceeds worst, and the control fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gorgon_common.workflow import catalogue
from tests.support.sandbox import start_sandbox

INSIDE = 0.95
FIGURES = ("cost", "input", "output", "time")
CONTROL = 0.5


@dataclass(frozen=True)
class Seen:
    """One figure of a run compared with its plan."""

    workflow: str
    turn: int
    figure: str
    low: float
    p95: float
    worst: float | None
    actual: float

    def inside(self, scale: float = 1.0) -> bool:
        """Return whether it lies inside the band; `scale` distorts the plan."""
        return scale * self.low <= self.actual <= scale * self.p95

    @property
    def exceeds(self) -> bool:
        return self.worst is not None and self.actual > self.worst


def gorgon(home: Path, url: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", *arguments, "--json"],
        env={**os.environ, "GORGON_HOME": str(home), "GORGON_ENV_FILE": "", "GORGON_SANDBOX_URL": url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"gorgon {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def seconds(run: Mapping[str, Any]) -> float:
    begin, end = (datetime.fromisoformat(str(run[name])) for name in ("started_at", "finished_at"))
    return (end - begin).total_seconds()


def compare(name: str, turn: int, plan: Mapping[str, Any], run: Mapping[str, Any]) -> list[Seen]:
    """Return the four figures of a run compared with its plan; a figure unknown in the plan counts as outside."""
    total = plan["total"]
    pairs = {
        "cost": (total["cost_usd"], run["cost_usd"]),
        "input": (total["tokens"]["input"], run["tokens"]["input"]),
        "output": (total["tokens"]["output"], run["tokens"]["output"]),
        "time": (total["time_s"], seconds(run)),
    }
    return [
        Seen(name, turn, figure, band["low"], band["p95"] or 0.0, band["worst"], actual)
        for figure, (band, actual) in pairs.items()
    ]


def measure(names: list[str], turns: int, seed: int) -> list[Seen]:
    found: list[Seen] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            with start_sandbox(seed=seed + turn, latency=None) as sandbox:
                for name in names:
                    plan = gorgon(Path(folder), sandbox.url, "plan", name)
                    found += compare(name, turn, plan, gorgon(Path(folder), sandbox.url, "run", name))
    return found


def share(seen: list[Seen], scale: float = 1.0) -> float:
    return sum(entry.inside(scale) for entry in seen) / len(seen)


@dataclass(frozen=True)
class Verdict:
    """Shares of figures inside their bands: costs, all, and all of the halved plans; and how many exceed worst."""

    cost: float
    all: float
    over: int
    control: float

    @property
    def met(self) -> bool:
        return self.cost >= INSIDE and self.all >= INSIDE and not self.over and self.control < INSIDE


def judge(seen: list[Seen]) -> Verdict:
    cost = share([entry for entry in seen if entry.figure == "cost"])
    return Verdict(cost, share(seen), sum(entry.exceeds for entry in seen), share(seen, CONTROL))


def main() -> int:
    parser = argparse.ArgumentParser(description="Plans against what then happened.")
    parser.add_argument("--turns", type=int, default=3, help="how often each workflow is planned and run")
    parser.add_argument("--seed", type=int, default=7, help="the sandbox's seed in the first turn")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    given = parser.parse_args()
    names = [entry.name for entry in catalogue.entries()]
    began = time.monotonic()
    seen = measure(names, given.turns, given.seed)
    if given.json:
        print(json.dumps([{**vars(entry), "inside": entry.inside()} for entry in seen], indent=1))
    print(f"{len(names)} workflows, {given.turns} turns, seed {given.seed}, {time.monotonic() - began:.0f} s")
    for turn in range(given.turns):
        mine = [entry for entry in seen if entry.turn == turn]
        parts = [f"{name} {share([entry for entry in mine if entry.figure == name]):.0%}" for name in FIGURES]
        past = "no past" if not turn else f"{turn} past {'run' if turn == 1 else 'runs'}"
        print(f"  {past:<12} inside the band: {', '.join(parts)}")
    for entry in seen:
        if not entry.inside() or entry.exceeds:
            band = f"{entry.low:g} … {entry.p95:g}, worst {entry.worst}"
            print(f"  outside: {entry.workflow}, turn {entry.turn}, {entry.figure} {entry.actual:g}, planned {band}")
    verdict = judge(seen)
    print(f"cost inside: {verdict.cost:.1%}; all figures: {verdict.all:.1%} (targets ≥ {INSIDE:.0%})")
    print(f"above worst: {verdict.over} (target 0); with plans halved: {verdict.control:.1%} (must be < {INSIDE:.0%})")
    print("met" if verdict.met else "NOT met")
    return 0 if verdict.met else 1


if __name__ == "__main__":
    sys.exit(main())
