"""Steps that are made of steps: map, loop, group, and a failed step with a fallback.

A composite is claimed where it becomes ready, expands into children and waits without a worker.  When the last child
has ended it is claimed again and goes on: the next round, or its end.  What it has done so far is in its expansions, so
it goes on from there whoever claims it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gorgon_common.engine import rows
from gorgon_common.engine.context import Run, result, results
from gorgon_common.engine.outcomes import Done, Expanded, Outcome
from gorgon_common.engine.records import ROW_MASK, Checkpoint, Claimed, Expansion, Result, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import ExpressionError, StepError
from gorgon_common.workflow.expressions import evaluate_condition, render_value
from gorgon_common.workflow.expressions.functions import of_type
from gorgon_common.workflow.plan import Kind, Node


class ChildFailed(StepError):
    """A step inside failed."""

    kind = "child_failed"


class TooMany(StepError):
    """There are more items than the map may have."""

    kind = "too_many_items"


def advance(run: Run, step: Claimed, *, parallel: int | None) -> Outcome:
    """Expand a composite, or go on with it.  Raises StepError where it fails.

    `parallel`: the workflow's `max_parallel`, for maps that have none of their own.
    """
    node = run.node(step)
    earlier = run.expansions(step.row)
    match node.kind:
        case Kind.MAP:
            return _map_ended(run, node, earlier[0]) if earlier else _map(run, step, node, parallel)
        case Kind.LOOP:
            return _loop(run, step, node, earlier)
        case Kind.GROUP:
            return _group_ended(run, node, earlier[0]) if earlier else _group(run, step, node)
    raise AssertionError(f"{node.kind} is not a composite")


def fallback(run: Run, step: Claimed, error: Mapping[str, Any]) -> Expanded:
    """Return the expansion of a failed step into its fallback."""
    (number,) = run.node(step).bodies["fallback"]
    child = rows.child_row(run.plan, number, row=0, parent=step.row, position=None)
    return Expanded([child], "fallback", round=len(run.expansions(step.row)), items=[dict(error)])


def fallback_ended(run: Run, expansion: Expansion) -> Result:
    """Return the result of a step whose fallback has ended.  Raises StepError where that failed too."""
    child = _children(run, expansion)[0]
    _check([child])
    assert child is not None
    return Result(StepStatus.SUCCEEDED, child.output, detail={"fallback": expansion.items[0].get("message")})


def _children(run: Run, expansion: Expansion) -> list[Checkpoint | None]:
    ids = [step_id(run.info.id, row) for row in range(expansion.base, expansion.base + expansion.count)]
    found = run.knowledge.checkpoints(ids)
    return [found.get(key) for key in ids]


def _check(children: Sequence[Checkpoint | None]) -> None:
    """Raise ChildFailed with the first failure among the children."""
    for child in children:
        if child is not None and child.status is StepStatus.FAILED:
            error = child.error or {}
            raise ChildFailed(
                f"{error.get('step', 'a step inside')}: {error.get('message', 'failed')}", hint=error.get("hint")
            )
    for child in children:
        if child is None or child.status is StepStatus.CANCELLED:
            raise ChildFailed("A step inside was cancelled.")


def _map(run: Run, step: Claimed, node: Node, parallel: int | None) -> Outcome:
    spec = node.spec
    over = spec["over"]
    over = render_value(over, run.env(step, node.refs), legacy=run.plan.lenient)
    if isinstance(over, Mapping):
        over = [{"key": key, "value": value} for key, value in over.items()]
    if over is None and run.plan.lenient:
        over = []
    if not isinstance(over, (list, tuple)):
        raise ExpressionError(
            f"`over:` of `{node.name}` gives {of_type(over)}, not a list.",
            hint=_no_list(over),
        )
    if len(over) > spec["max_items"]:
        raise TooMany(
            f"`{node.name}` has {len(over)} items; at most {spec['max_items']} are allowed.",
            hint="Raise `max_items:` of its map, or give it fewer items.",
        )
    if not over:
        return Done(Result(StepStatus.SUCCEEDED, []))
    return _items(run, step, node, list(over), spec.get("max_parallel") or parallel)


def _no_list(value: Any) -> str:
    """Return what to do about a value that was to be a list."""
    if value is None:
        return "Give it a value, or write default(…, []) for an empty list where there is none."
    if isinstance(value, str):
        return "Use lines(…) or split(…) to make a list of a text."
    return "Write [x] to make a list of one value."


def _items(run: Run, step: Claimed, node: Node, over: list[Any], parallel: int | None) -> Expanded:
    count = len(over)
    window = min(parallel or count, count)
    (template,) = node.bodies["item"]
    reduce = node.bodies.get("reduce")
    children = [
        rows.child_row(
            run.plan,
            template,
            row=index,
            parent=step.row,
            position=index,
            deps_left=0 if index < window else 1,
            successors=[count] if reduce else [],
            grouped=index < window,
        )
        for index in range(count)
    ]
    if reduce:
        children.append(rows.child_row(run.plan, reduce[0], row=count, parent=step.row, position=None, deps_left=count))
    return Expanded(
        children,
        "item",
        items=over,
        window=window if window < count else None,
        reduce=count if reduce else None,
    )


def _enough(run: Run, node: Node, expansion: Expansion) -> None:
    """Raise ChildFailed where a map has failed for the number of its failed items."""
    items = _children(run, expansion)[: len(expansion.items)]
    failed = [item for item in items if item is None or item.status in (StepStatus.FAILED, StepStatus.CANCELLED)]
    if not failed:
        return
    # Where one failed and the others were cancelled for it, it is that one that people have to know of.
    first = next((item for item in failed if item is not None and item.status is StepStatus.FAILED), failed[0])
    error = {} if first is None else first.error or {}
    why = str(result(first)["error"])
    if error.get("step"):
        why = f"{error['step']}: {why}"
    if node.spec.get("on_item_failure", "fail") == "fail":
        raise ChildFailed(f"An item failed: {why}", hint=error.get("hint"))
    wanted = math.ceil(len(items) * float(node.spec.get("min_success") or 0) - 1e-9)
    good = len(items) - len(failed)
    if good < wanted:
        raise ChildFailed(
            f"{good} of {len(items)} items succeeded, but {wanted} must; the first error: {why}", hint=error.get("hint")
        )


def _map_ended(run: Run, node: Node, expansion: Expansion) -> Outcome:
    _enough(run, node, expansion)
    found = results(run, expansion.id & ROW_MASK)
    failures = sum(1 for entry in found if isinstance(entry, Mapping) and entry.get("failed") is True)
    detail = {"items": len(found), "failed_items": failures or None}
    if expansion.reduce is None:
        return Done(Result(StepStatus.SUCCEEDED, found, detail=detail))
    key = step_id(run.info.id, expansion.reduce)
    reduced = run.knowledge.checkpoints([key]).get(key)
    _check([reduced])
    return Done(Result(StepStatus.SUCCEEDED, result(reduced), detail=detail))


def _loop(run: Run, step: Claimed, node: Node, earlier: Sequence[Expansion]) -> Outcome:
    (body,) = node.bodies["body"]
    if earlier:
        last = _children(run, earlier[-1])[0]
        _check([last])
        own = run.value(body, last)
        names = {node.id: own, run.plan.nodes[body].id: own}
        met, _ = evaluate_condition(node.spec["until"], run.env(step, node.refs, names), lenient=run.plan.lenient)
        if met or len(earlier) >= node.spec["max"]:
            assert last is not None
            detail = {"iterations": len(earlier), "until_met": met}
            return Done(Result(StepStatus.SUCCEEDED, last.output, detail=detail))
    child = rows.child_row(run.plan, body, row=0, parent=step.row, position=len(earlier))
    return Expanded([child], "body", round=len(earlier))


def _group(run: Run, step: Claimed, node: Node) -> Outcome:
    body = node.bodies["steps"]
    children = rows.body_rows(run.plan, run.successors, body, parent=step.row)
    window = node.spec.get("max_parallel")
    if window is None or window >= len(children) or any(child.deps_left for child in children):
        return Expanded(children, "steps")
    opened = [child if child.row < window else replace(child, deps_left=1) for child in children]
    return Expanded(opened, "steps", window=window)


def _group_ended(run: Run, node: Node, expansion: Expansion) -> Outcome:
    children = _children(run, expansion)
    _check(children)
    output = {
        run.plan.nodes[number].id: child.output if child is not None else None
        for number, child in zip(node.bodies["steps"], children, strict=True)
    }
    return Done(Result(StepStatus.SUCCEEDED, output))
