"""A run as lines to show: what is nested in what, how far it is, what it used.  Knows no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gorgon_common.cli.terminal import tokens_of
from gorgon_common.clock import parse_time

FINISHED = frozenset({"succeeded", "failed", "skipped", "cancelled"})
_BODY = re.compile(r"^(?P<parent>.+?)(?P<body>\[\]|#|\.reduce|\.fallback)$")
ENGINE_KINDS = frozenset({"gate", "finally", "end"})


@dataclass(slots=True)
class Line:
    """One step, or a map with its items as a progress.  Durations in seconds, money in dollars.

    `done` of `total` items or iterations are finished; `total` is 0 where there are none.
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
    elapsed: float | None = None
    attempts: int = 0
    done: int = 0
    failed: int = 0
    total: int = 0


@dataclass(slots=True)
class _Branch:
    step: Mapping[str, Any]
    children: list[_Branch] = field(default_factory=list)
    items: list[_Branch] = field(default_factory=list)


def outline(run: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], now: datetime) -> list[Line]:
    """Return the lines of a run given with its steps.

    `nodes` are the compiled steps (`views.plan_nodes`), for what is nested in what; without them the ids alone tell.
    """
    parents = {str(node["id"]): node.get("parent") for node in nodes}
    rows = [step for step in run.get("steps") or () if step.get("kind") not in ENGINE_KINDS]
    branches: dict[str, _Branch] = {}
    order: list[_Branch] = []
    for step in rows:
        branch = _Branch(step)
        branches.setdefault(str(step["id"]), branch)
        order.append(branch)
    tops: list[_Branch] = []
    for branch in order:
        identity = str(branch.step["id"])
        parent = parents.get(identity) or branch.step.get("parent") or _parent_by_name(identity)
        holder = branches.get(str(parent)) if parent else None
        if holder is None or holder is branch:
            tops.append(branch)
        elif branch.step.get("item") is not None:
            holder.items.append(branch)
        else:
            holder.children.append(branch)
    return [line for top in tops for line in _lines(top, 0, now)]


def _parent_by_name(identity: str) -> str | None:
    found = _BODY.match(identity)
    return found["parent"] if found else None


def _lines(branch: _Branch, depth: int, now: datetime) -> Iterator[Line]:
    line = _line(branch, depth, now)
    yield line
    for child in branch.children:
        yield from _lines(child, depth + 1, now)
    for item in branch.items:
        if item.step["status"] == "failed":
            shown = _line(item, depth + 1, now)
            shown.name = f"{line.name}[{item.step['item']}]"
            yield shown


def _line(branch: _Branch, depth: int, now: datetime) -> Line:
    step = branch.step
    inner = [entry.step for entry in _below(branch)]
    own = [step, *inner] if not tokens_of(step) else [step]
    costs = [float(entry["cost_usd"]) for entry in own if entry.get("cost_usd") is not None]
    message, hint = error_text(step.get("error"))
    items = [entry.step for entry in branch.items]
    return Line(
        name=short_name(str(step["id"])),
        status=str(step["status"]),
        depth=depth,
        kind=str(step.get("kind") or ""),
        who=_who(step, inner),
        reason=str(step.get("reason") or ""),
        error=message,
        hint=hint,
        tokens=sum(tokens_of(entry) for entry in own),
        cost=sum(costs) if costs else None,
        elapsed=elapsed(step, now),
        attempts=int(step.get("attempts") or 0),
        done=sum(entry["status"] in FINISHED for entry in items),
        failed=sum(entry["status"] == "failed" for entry in items),
        total=len(items),
    )


def _below(branch: _Branch) -> Iterator[_Branch]:
    for child in (*branch.children, *branch.items):
        yield child
        yield from _below(child)


def _who(step: Mapping[str, Any], inner: Sequence[Mapping[str, Any]]) -> str:
    named = next((entry for entry in (step, *inner) if entry.get("role") or entry.get("model")), step)
    return " · ".join(str(named[name]) for name in ("role", "model") if named.get(name))


def short_name(identity: str) -> str:
    """Return the name a person knows a step by: `build[]` is `build`, `build.reduce` is `reduce`."""
    found = _BODY.match(identity)
    if not found:
        return identity
    return found["body"][1:] if found["body"].startswith(".") else found["parent"]


def label(step: Mapping[str, Any]) -> str:
    """Return the name of one row in a list without nesting: `build[3]`, `build.reduce`."""
    identity = str(step["id"])
    item = step.get("item")
    if item is None:
        return identity
    return f"{identity.removesuffix('[]').removesuffix('#')}[{item}]"


def error_text(error: Any) -> tuple[str, str]:
    """Return the message and the hint of an error of a run or a step."""
    if not error:
        return "", ""
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("kind") or "failed"), str(error.get("hint") or "")
    return str(error), ""


def elapsed(document: Mapping[str, Any], now: datetime) -> float | None:
    """Return how long a run or a step took, or takes already; None where it has not begun."""
    started = document.get("started_at")
    if not started:
        return None
    finished = document.get("finished_at")
    return max(0.0, ((parse_time(finished) if finished else now) - parse_time(started)).total_seconds())
