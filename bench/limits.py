"""`python -m bench.limits` (`make bench-limits`): how much of a quota is used, and how many calls are refused.

Four worker processes drive the limiter against the sandbox's own token buckets and windows, each scenario on an account
of its own, side by side.  Beside each figure stands what others do, or a control in which the same harness sees the
fault.
Exits with 0 only where every target is reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis

from bench import quota_engine
from bench.figures import Target, table
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.servers import dying_with_parent, free_port, redis_executable

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 4
LATENCY = "100ms"
SEED = 20_261_122
PARTS = ("filled", "faults", "others", "engine")


@dataclass
class Case:
    """A scenario for the workers of `bench.quota_worker`.

    `limit` is in calls per minute if requests are the bottleneck, otherwise in the tokens of `binds`.  `rule` is what
    the sandbox enforces, `quota` is Gorgon's configuration.  `measured`: seconds that count, after `warm` seconds;
    `aligned` to whole windows.
    """

    name: str
    rule: dict[str, Any]
    way: str = "gorgon"
    provider: str = "openai"
    limit: float = 600
    quota: dict[str, Any] = field(default_factory=dict)
    binds: str = "requests"
    threads: dict[str, int] = field(default_factory=lambda: {"team": 24})
    prompt: int = 80
    max_tokens: int = 300
    warm: float = 25.0
    measured: float = 300.0
    aligned: float = 0.0
    redis: str = "shared"

    def told(self, sandbox: Sandbox, redis_url: str, begins: float) -> dict[str, Any]:
        """Return it in the form that the workers read."""
        ends = begins + self.warm + self.measured + (self.aligned if self.aligned else 0)
        return {
            "name": self.name,
            "way": self.way,
            "provider": self.provider,
            "url": sandbox.url,
            "redis_url": redis_url,
            "account": self.name,
            "quota": self.quota or {"requests": self.limit},
            "limit": self.limit,
            "threads": self.threads,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "begins": begins,
            "ends": ends,
            "seed": SEED,
        }

    def window(self, begins: float) -> tuple[float, float]:
        """Return the measured interval."""
        since = begins + self.warm
        if self.aligned:
            since = math.ceil(since / self.aligned) * self.aligned
            return since, since + math.floor(self.measured / self.aligned) * self.aligned
        return since, since + self.measured


@dataclass
class Seen:
    """The sandbox's log of a case, and the reports of the workers."""

    case: Case
    begins: float
    log: list[dict[str, Any]]
    calls: list[list[Any]]
    given_up: int

    def within(self, since: float, until: float) -> list[dict[str, Any]]:
        """Return the requests in an interval."""
        return [entry for entry in self.log if since <= entry["time"] < until]

    def used(self, since: float, until: float, limit: float | None = None) -> float:
        """Return the share of the quota that was used."""
        units = sum(self.units(entry) for entry in self.within(since, until) if entry["status"] == 200)
        return units / ((limit or self.case.limit) / 60 * (until - since))

    def units(self, entry: dict[str, Any]) -> float:
        """Return how much a request has used of the dimension that is the bottleneck."""
        if self.case.binds == "requests":
            return 1.0
        usage = entry["usage"]
        return float(usage["input"] - usage.get("cached", 0) if self.case.binds == "input" else usage["output"])

    def refused(self, since: float, until: float) -> tuple[int, int]:
        """Return (calls that were admitted, calls that were refused)."""
        entries = self.within(since, until)
        return sum(e["status"] == 200 for e in entries), sum(e["status"] == 429 for e in entries)

    def violations(self) -> int:
        """Return how many calls were granted after a 429 had arrived and before its Retry-After had passed."""
        pauses = sorted((call[4], call[4] + call[6]) for call in self.calls if call[5] == 429 and call[6])
        grants = sorted(call[2] for call in self.calls)
        return sum(since + 0.02 < grant < until - 0.005 for since, until in pauses for grant in grants)

    def excess(self, since: float, seconds: float) -> float:
        """Return by how many calls, including refused ones, the limit was exceeded in an interval that begins at
        `since`.
        """
        times = [entry["time"] for entry in self.within(since, since + seconds)]
        rate = self.case.limit / 60
        return max((place + 1 - rate * (at - since) for place, at in enumerate(times)), default=0.0)

    def busiest(self, seconds: float = 60.0) -> int:
        """Return the maximum number of calls in any interval of that length."""
        times = [entry["time"] for entry in self.log if entry["status"] == 200]
        first, most = 0, 0
        for last, at in enumerate(times):
            while times[first] <= at - seconds:
                first += 1
            most = max(most, last - first + 1)
        return most


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls: about three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    asked = parser.parse_args(arguments)
    parts = asked.only
    since = time.monotonic()
    found: list[Target] = []
    measures: list[Callable[[], list[Target]]] = []
    if "filled" in parts or "faults" in parts:
        measures.append(lambda: slow(quick=asked.quick, parts=parts))
    if "filled" in parts:
        measures.append(lambda: fast(quick=asked.quick))
    if "others" in parts:
        measures.append(lambda: others(quick=asked.quick))
    if "engine" in parts:
        measures.append(lambda: quota_engine.measure(quick=asked.quick, say=say))
    for measure in measures:
        made = measure()
        found += made
        say(table(made))
    print(f"\nseed {SEED}; {PROCESSES} worker processes; replies of {LATENCY}; {time.monotonic() - since:.0f} s\n")
    print(table(found))
    missed = [target.name for target in found if not target.met]
    aimed = sum(target.aim is not None for target in found)
    print(f"\n{aimed - len(missed)} of {aimed} targets are met." + "".join(f"\nMISSED: {name}" for name in missed))
    if asked.json:
        asked.json.write_text(json.dumps([{**asdict(target), "met": target.met} for target in found], indent=1))
    return 1 if missed else 0


# 600 calls a minute, all at once


def slow(*, quick: bool, parts: Sequence[str]) -> list[Target]:
    """Run the scenarios of 600 calls a minute side by side."""
    length = 60.0 if quick else 300.0
    filled = [
        Case("bucket-600", {"requests": 600, "burst": 0.1}, measured=length),
        Case("window10-600", _window(600, 10), measured=length, aligned=10),
        Case("window60-600", _window(600, 60), measured=length, aligned=60),
        Case(
            "input-300k",
            {"requests": 6000, "input_tokens": 300_000},
            provider="anthropic",
            limit=300_000,
            quota={"requests": 6000, "input_tokens": 300_000},
            binds="input",
            prompt=1900,
            measured=length,
        ),
        Case(
            "output-54k",
            {"requests": 6000, "output_tokens": 54_000},
            provider="anthropic",
            limit=54_000,
            quota={"requests": 6000, "output_tokens": 54_000},
            binds="output",
            max_tokens=400,
            measured=length,
        ),
    ]
    faults = [
        Case("halved", {"requests": 600}, measured=max(length, 120.0)),
        Case("pauses", {"requests": 600}, measured=80.0),
        Case("pauses-backoff", {"requests": 600}, way="backoff", measured=50.0),
        Case("teams", {"requests": 600}, threads={"large": 20, "middle": 3, "small": 1}, measured=length),
        Case("flushed", {"requests": 600}, measured=110.0, warm=20, redis="flushed"),
        Case("flushed-full", {"requests": 600}, way="full", measured=60.0, warm=20, redis="flushed-full"),
        Case("redis-down", {"requests": 600}, measured=110.0, warm=20, redis="down"),
    ]
    cases = (filled if "filled" in parts else []) + (faults if "faults" in parts else [])
    marks: dict[str, list[float]] = {}

    def meddle(sandbox: Sandbox, servers: dict[str, Redis], begins: float) -> None:
        if "faults" in parts:
            pauses = {"account": "pauses*", "status": 429, "retry_after": "2s", "every": 40}
            sandbox.faults(pauses)
            for work in (_halve, _flush, _down):
                thread = threading.Thread(target=work, args=(sandbox, servers, begins, marks), daemon=True)
                thread.start()

    seen = drive(cases, meddle)
    targets = [target for case in filled if case.name in seen for target in _filled(seen[case.name])]
    if "faults" in parts:
        targets += [*_halved(seen["halved"], marks), *_paused(seen), *_fair(seen["teams"]), *_flushed(seen, marks)]
        targets += _was_down(seen["redis-down"], marks)
    return targets


def _window(limit: int, seconds: int) -> dict[str, Any]:
    return {"requests": limit, "mode": "window", "window": seconds}


def _filled(seen: Seen) -> list[Target]:
    since, until = seen.case.window(seen.begins)
    let_in, refused = seen.refused(since, until)
    aim = 0.95 if seen.case.binds == "output" else 0.99
    denials = sum(call[7] for call in seen.calls) / max(1, len(seen.calls))
    what = f"{let_in:,} calls in {until - since:.0f} s; told to wait {denials:.1f} times a call"
    share = refused / max(1, let_in + refused)
    return [
        Target(f"{seen.case.name}: quota used", seen.used(since, until), "percent", aim, note=what),
        Target(f"{seen.case.name}: refused", share, "percent", 0.001, below=True, note=f"{refused} times 429"),
        Target(f"{seen.case.name}: jobs given up", seen.given_up, "count", 0, below=True),
    ]


def _halve(sandbox: Sandbox, servers: dict[str, Redis], begins: float, marks: dict[str, list[float]]) -> None:
    _sleep_until(begins + 40)
    sandbox.limits({"account": "halved", "requests": 300, "burst": 0.02})
    marks["halved"] = [time.time()]


def _halved(seen: Seen, marks: dict[str, list[float]]) -> list[Target]:
    at = marks["halved"][0]
    until = seen.begins + seen.case.warm + seen.case.measured
    back = seen.used(at + 30, until, 300)
    let_in, refused = seen.refused(at, until)
    first = next((second for second in range(31) if seen.used(at + second, at + second + 30, 300) >= 0.95), 31)
    return [
        Target(
            "limit halved: used 30 s later", back, "percent", 0.95, note=f"{refused} times 429 of {let_in + refused}"
        ),
        Target("limit halved: back at 95 % after", first, "seconds", 30, below=True),
    ]


def _paused(seen: dict[str, Seen]) -> list[Target]:
    ours, theirs = seen["pauses"], seen["pauses-backoff"]
    met = sum(call[5] == 429 for call in ours.calls)
    note = f"{met} pauses of 2 s were asked for"
    return [
        Target("calls within a Retry-After", ours.violations(), "count", 0, below=True, note=note),
        Target("… control: exponential backoff", theirs.violations(), "count"),
    ]


def _fair(seen: Seen) -> list[Target]:
    since, until = seen.case.window(seen.begins)
    counts = dict.fromkeys(seen.case.threads, 0)
    for call in seen.calls:
        if since <= call[2] < until and call[5] == 200:
            counts[call[0]] += 1
    total, squares = sum(counts.values()), sum(count**2 for count in counts.values())
    shown = ", ".join(f"{team} {count:,}" for team, count in counts.items())
    by_demand = [20 / 24, 3 / 24, 1 / 24]
    unfair = 1 / (3 * sum(share**2 for share in by_demand))
    return [
        Target("teams with 20, 3 and 1 workers: Jain index", total**2 / (3 * squares), "ratio", 0.98, note=shown),
        Target("… control: served as they come", unfair, "ratio", note="by the share of workers"),
        Target("… quota used meanwhile", seen.used(since, until), "percent", 0.99),
    ]


def _flush(sandbox: Sandbox, servers: dict[str, Redis], begins: float, marks: dict[str, list[float]]) -> None:
    marks["flushed"], marks["flushed-full"] = [], []
    for number in range(5):
        _sleep_until(begins + 25 + number * 17)
        for name in ("flushed", "flushed-full"):
            if name == "flushed" or number < 2:
                with contextlib.closing(redis.Redis.from_url(servers[name].url)) as client:
                    client.flushall()
                marks[name].append(time.time())


def _flushed(seen: dict[str, Seen], marks: dict[str, list[float]]) -> list[Target]:
    over = [seen["flushed"].excess(at, 10) for at in marks["flushed"]]
    control = [seen["flushed-full"].excess(at, 10) for at in marks["flushed-full"]]
    shown = ", ".join(f"{value:.1f}" for value in over)
    # one second's worth, plus the calls that were in flight
    return [
        Target("FLUSHALL ×5: most calls over the limit", max(over), "count", 11, below=True, note=f"each: {shown}"),
        Target("… control: a bucket that starts full", max(control), "count", note=f"{len(control)} times"),
    ]


def _down(sandbox: Sandbox, servers: dict[str, Redis], begins: float, marks: dict[str, list[float]]) -> None:
    _sleep_until(begins + 30)
    servers["down"].stop()
    marks["down"] = [time.time()]
    _sleep_until(begins + 90)
    servers["down"].start()
    marks["down"].append(time.time())
    time.sleep(600)  # a server ends with the thread that started it


def _was_down(seen: Seen, marks: dict[str, list[float]]) -> list[Target]:
    since, until = marks["down"]
    let_in, refused = seen.refused(since, until)
    back = seen.used(until + 15, seen.begins + seen.case.warm + seen.case.measured)
    return [
        Target("Redis down 60 s: quota used", seen.used(since, until), "percent", 0.30, note=f"{let_in} calls"),
        Target("… refused", refused / max(1, let_in + refused), "percent", 0.001, below=True, note=f"{refused} times"),
        Target("… most calls in any 60 s", seen.busiest(), "count", 601, below=True, note="the limit is 600"),
        Target("… quota used 15 s after it is back", back, "percent", 0.94),
    ]


# 6,000 calls a minute


def fast(*, quick: bool) -> list[Target]:
    """Run the scenarios of 6,000 calls a minute side by side."""
    length = 30.0 if quick else 60.0
    many = {"team": 60}
    cases = [
        Case("bucket-6000", {"requests": 6000, "burst": 0.1}, limit=6000, threads=many, measured=length, warm=15),
        Case("window10-6000", _window(6000, 10), limit=6000, threads=many, measured=length, warm=15, aligned=10),
        Case("window60-6000", _window(6000, 60), limit=6000, threads=many, measured=60, warm=15, aligned=60),
    ]
    seen = drive(cases)
    return [target for case in cases for target in _filled(seen[case.name])]


# Alternatives


def others(*, quick: bool) -> list[Target]:
    """Run the alternatives at 600 and at 6,000 calls a minute."""
    length = 15.0 if quick else 30.0
    cases = [
        Case(
            f"{way}-{limit}",
            {"requests": limit, "burst": 0.1},
            way=way,
            limit=limit,
            threads=threads,
            warm=15,
            measured=length,
        )
        for limit, threads in ((600, {"team": 24}), (6000, {"team": 60}))
        for way in ("sdk", "backoff")
    ]
    names = {"sdk": "the SDK's own retries", "backoff": "a semaphore with exponential backoff"}
    targets = []
    for pair in (cases[:2], cases[2:]):
        seen = drive(pair)
        for case in pair:
            since, until = case.window(seen[case.name].begins)
            let_in, refused = seen[case.name].refused(since, until)
            note = f"{refused / max(1, let_in):.2f} refusals a success, {seen[case.name].given_up} jobs given up"
            title = f"{names[case.way]}, {case.limit:,.0f} a minute: quota used"
            targets.append(Target(title, seen[case.name].used(since, until), "percent", note=note))
    return targets


# The driver


class Redis:
    """A Redis that can be stopped and restarted on its port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, empty."""
        argv = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        argv += ["--dir", str(self._folder), "--maxmemory-policy", "noeviction"]
        self._process = subprocess.Popen(dying_with_parent(argv), stdout=subprocess.DEVNULL)
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                with contextlib.suppress(redis.ConnectionError):
                    if client.ping():
                        return
                time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def redis_servers(names: Sequence[str]) -> Iterator[dict[str, Redis]]:
    """Run a Redis for each name."""
    with tempfile.TemporaryDirectory(prefix="gorgon-bench-") as folder:
        made: dict[str, Redis] = {}
        try:
            for name in dict.fromkeys(names):
                made[name] = Redis(Path(folder))
            yield made
        finally:
            for server in made.values():
                server.stop()


def drive(
    cases: Sequence[Case], meddle: Callable[[Sandbox, dict[str, Redis], float], None] = lambda *_: None
) -> dict[str, Seen]:
    """Run cases side by side in four processes; return the observations of each."""
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(start_sandbox(seed=SEED, latency=LATENCY))
        servers = stack.enter_context(redis_servers([case.redis for case in cases]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-bench-")))
        for case in cases:
            sandbox.limits({"account": case.name, "provider": case.provider, **case.rule})
        begins = time.time() + 3
        told = [case.told(sandbox, servers[case.redis].url, begins) for case in cases]
        spec = folder / "spec.json"
        spec.write_text(json.dumps(told))
        longest = max(case["ends"] for case in told) - time.time()
        say(f"{', '.join(case.name for case in cases)}: {longest:.0f} s")
        meddle(sandbox, servers, begins)
        processes = [
            subprocess.Popen(
                dying_with_parent(
                    [sys.executable, "-m", "bench.quota_worker", str(spec), str(number), str(folder / f"{number}.json")]
                ),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for number in range(PROCESSES)
        ]
        for process in processes:
            if process.wait(longest + 60):
                raise RuntimeError("a worker of the benchmark has failed")
        outs = [json.loads((folder / f"{number}.json").read_text()) for number in range(PROCESSES)]
        found = {}
        for place, case in enumerate(cases):
            calls = [call for out in outs for call in out[place]["calls"]]
            given_up = sum(out[place]["given_up"] for out in outs)
            found[case.name] = Seen(case, begins, sandbox.log(account=case.name), calls, given_up)
        return found


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def say(text: str) -> None:
    """Print the progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
