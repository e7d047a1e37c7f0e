"""A run as lines for display: nesting, progress and usage.  Independent of any terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gorgon_common.cli.terminal import safe, seconds, tokens_of
from gorgon_common.clock import parse_time

FINISHED = frozenset({"succeeded", "failed", "skipped", "cancelled"})
ENGINE_KINDS = frozenset({"gate", "finally", "end"})
_REPEATING = frozenset({"map", "loop"})
_COMPOSITE = _REPEATING | {"group"}
_PARTS = (".reduce", ".fallback")


@dataclass(slots=True)
class Line:
    """One step, or a map with the progress of its items.  Durations in seconds, money in dollars.

    `done` of `total` items or iterations have finished; `total` is 0 if there are none.  `cost` is the known part of
    the cost, `unpriced` the number of calls whose cost is unknown.  `waited`: how long it has waited for `reason`;
    `goes_on`: in how many seconds it continues (below 0: any moment); None if that is unknown.  `waiting`: how many
    items wait.
    """

    name: str
    status: str
    depth: int = 0
    kind: str = ""
    who: str = ""
    reason: str = ""
    error: str = ""
    hint: str = ""
    tokens: int = 0
    cost: float | None = None
    unpriced: int = 0
    elapsed: float | None = None
    attempts: int = 0
    done: int = 0
    failed: int = 0
    total: int = 0
    waited: float | None = None
    goes_on: float | None = None
    waiting: int = 0


@dataclass(slots=True)
class _Branch:
    step: Mapping[str, Any]
    children: list[_Branch] = field(default_factory=list)
    items: list[_Branch] = field(default_factory=list)

    def holds(self, step: Mapping[str, Any]) -> bool:
        """Return whether a later step belongs directly under this one."""
        if self.step["id"] != step.get("parent"):
            return False
        kind = self.step.get("kind")
        if _is_item(step) or str(step["id"]).endswith(".reduce"):
            return kind in _REPEATING
        return kind in _COMPOSITE or str(step["id"]).endswith(".fallback")


def outline(run: Mapping[str, Any], now: datetime) -> list[Line]:
    """Return the lines of a run with its steps; each step comes before its expansion."""
    tops: list[_Branch] = []
    above: list[_Branch] = []
    for step in run.get("steps") or ():
        if step.get("kind") in ENGINE_KINDS:
            continue
        branch = _Branch(step)
        while above and not above[-1].holds(step):
            above.pop()
        if not above:
            tops.append(branch)
        elif _is_item(step):
            above[-1].items.append(branch)
        else:
            above[-1].children.append(branch)
        above.append(branch)
    return [line for top in tops for line in _lines(top, 0, now)]


def _is_item(step: Mapping[str, Any]) -> bool:
    """Return whether it is an item of the map, or an iteration of the loop, of the same name."""
    return step.get("item") is not None and step["id"] == step.get("parent")


def _lines(branch: _Branch, depth: int, now: datetime) -> Iterator[Line]:
    line = _line(branch, depth, now)
    yield line
    if branch.step.get("kind") == "loop":
        for child in branch.items[-1].children if branch.items else ():  # of the current iteration
            yield from _lines(child, depth + 1, now)
    for child in branch.children:
        yield from _lines(child, depth + 1, now)
    for item in branch.items:
        if item.step["status"] == "failed":
            shown = _line(item, depth + 1, now)
            shown.name = label(item.step)
            yield shown


def _line(branch: _Branch, depth: int, now: datetime) -> Line:
    step = branch.step
    inner = [entry.step for entry in _below(branch)]
    own = [step, *inner] if not tokens_of(step) else [step]
    sums = (entry.get("known_cost_usd", entry.get("cost_usd")) for entry in own)
    costs = [float(cost) for cost in sums if cost is not None]
    message, hint = error_text(step.get("error"))
    items = [entry.step for entry in branch.items]
    waiting = [entry for entry in items if entry["status"] == "waiting" and entry.get("waits")]
    waits = (
        step
        if step["status"] in ("waiting", "ready")
        else max(waiting, key=lambda item: _waited(item, now) or 0.0, default=step)
    )
    return Line(
        name=_name(str(step["id"])),
        status=str(step["status"]),
        depth=depth,
        kind=str(step.get("kind") or ""),
        who=_who(step, inner),
        reason=str(waits.get("reason") or ""),
        error=message,
        hint=hint,
        tokens=sum(tokens_of(entry) for entry in own),
        cost=sum(costs) if costs else None,
        unpriced=sum(int(entry.get("unpriced_calls") or 0) for entry in own),
        elapsed=elapsed(step, now),
        attempts=int(step.get("attempts") or 0),
        done=sum(entry["status"] in FINISHED for entry in items),
        failed=sum(entry["status"] == "failed" for entry in items),
        total=len(items),
        waited=_waited(waits, now),
        goes_on=_goes_on(waits, now),
        waiting=len(waiting),
    )


def _waited(step: Mapping[str, Any], now: datetime) -> float | None:
    since = (step.get("waits") or {}).get("since")
    return None if since is None else max(0.0, (now - parse_time(since)).total_seconds())


def _goes_on(step: Mapping[str, Any], now: datetime) -> float | None:
    until = (step.get("waits") or {}).get("until")
    return None if until is None else (parse_time(until) - now).total_seconds()


def _below(branch: _Branch) -> Iterator[_Branch]:
    for child in (*branch.children, *branch.items):
        yield child
        yield from _below(child)


def _who(step: Mapping[str, Any], inner: Sequence[Mapping[str, Any]]) -> str:
    if step.get("adopted_from"):
        return "reused"
    named = next((entry for entry in (step, *inner) if entry.get("role") or entry.get("model")), step)
    return " · ".join(str(named[name]) for name in ("role", "model") if named.get(name))


def _name(identity: str) -> str:
    """Return the name relative to its parent step: `build.reduce` is `reduce` below `build`."""
    return identity.rpartition(".")[2] if identity.endswith(_PARTS) else identity


def label(step: Mapping[str, Any]) -> str:
    """Return the name of one row in a flat list: `build[3]`, `build.reduce`."""
    item = step.get("item")
    return str(step["id"]) if item is None else f"{step['id']}[{item}]"


def error_text(error: Any) -> tuple[str, str]:
    """Return the message and the hint of an error of a run or a step."""
    if not error:
        return "", ""
    if isinstance(error, Mapping):
        message = str(error.get("message") or error.get("kind") or "failed")
        return safe(message), safe(str(error.get("hint") or ""))
    return safe(str(error)), ""


def elapsed(document: Mapping[str, Any], now: datetime) -> float | None:
    """Return how long a run or a step took, or has been running; None if it has not begun."""
    started = document.get("started_at")
    if not started:
        return None
    finished = document.get("finished_at")
    return max(0.0, ((parse_time(finished) if finished else now) - parse_time(started)).total_seconds())


def standing(run: Mapping[str, Any], now: datetime) -> str:
    """Return a sentence that says why a whole run is stalled: it waits for its concurrency key, or its process has
    died.
    """
    waits = run.get("waits_for")
    if waits:
        since = waits.get("since")
        waited = f" (for {seconds((now - parse_time(since)).total_seconds())} now)" if since else ""
        return f"The run {waits['what']}{waited}."
    if run.get("orphaned"):
        return f"The process of this run has died. To continue it: gorgon runs resume {run['run_id']}"
    return ""
