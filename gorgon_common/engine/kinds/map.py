"""`map:` — runs one body per item of a list, then an optional `reduce:`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from gorgon_common.engine import rows
from gorgon_common.engine.context import Run
from gorgon_common.engine.expression_scope import result, results
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.kinds.composite import ChildFailed, check, children
from gorgon_common.engine.outcomes import Expanded, Outcome
from gorgon_common.engine.records import ROW_MASK, Claimed, Expansion, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import ExpressionError, StepError
from gorgon_common.workflow.expressions import render_value
from gorgon_common.workflow.expressions.functions import of_type
from gorgon_common.workflow.plan import Node


class TooManyItems(StepError):
    """There are more items than the map may have."""

    kind = "too_many_items"


class Map(StepHandler):
    """Expands into all of its items at once; a window limits how many run at a time to `max_parallel`."""

    kind: ClassVar[str] = "map"

    def execute(self, context: StepContext) -> Outcome:
        """Expand, or end with the results in item order.  Raises ChildFailed, TooManyItems."""
        earlier = context.run.expansions(context.step.row)
        if earlier:
            return _ended(context, earlier[0])
        items = _items(context)
        if not items:
            return context.succeeded([])
        context.budget.afford(context.node, items)
        parallel = context.node.spec.get("max_parallel") or context.run.plan.limits.get("max_parallel")
        return _expanded(context.run, context.step, context.node, items, parallel)

    def stops_at_failure(self, node: Node) -> bool:
        """True for `on_item_failure: fail`, the default."""
        return bool(node.spec.get("on_item_failure", "fail") == "fail")


def _items(context: StepContext) -> list[Any]:
    node, lenient = context.node, context.run.plan.lenient
    over = render_value(node.spec["over"], context.env(), legacy=lenient)
    if isinstance(over, Mapping):
        over = [{"key": key, "value": value} for key, value in over.items()]
    if over is None and lenient:
        over = []
    if not isinstance(over, (list, tuple)):
        raise ExpressionError(f"`over:` of `{node.name}` gives {of_type(over)}, not a list.", hint=_no_list(over))
    if len(over) > node.spec["max_items"]:
        raise TooManyItems(
            f"`{node.name}` has {len(over)} items; at most {node.spec['max_items']} are allowed.",
            hint="Raise `max_items:` of its map, or give it fewer items.",
        )
    return list(over)


def _no_list(value: Any) -> str:
    """Return a hint for a value that should have been a list."""
    if value is None:
        return "Give it a value, or write default(…, []) for an empty list where there is none."
    if isinstance(value, str):
        return "Use lines(…) or split(…) to make a list of a text."
    return "Write [x] to make a list of one value."


def _expanded(run: Run, step: Claimed, node: Node, items: list[Any], parallel: int | None) -> Expanded:
    count = len(items)
    window = min(parallel or count, count)
    (template,) = node.bodies["item"]
    reduce = node.bodies.get("reduce")
    bodies = [
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
        bodies.append(rows.child_row(run.plan, reduce[0], row=count, parent=step.row, position=None, deps_left=count))
    return Expanded(
        bodies,
        "item",
        items=items,
        window=window if window < count else None,
        reduce=count if reduce else None,
    )


def _ended(context: StepContext, expansion: Expansion) -> Outcome:
    run = context.run
    _check_enough(run, context.node, expansion)
    found = results(run, expansion.id & ROW_MASK)
    failures = sum(1 for entry in found if isinstance(entry, Mapping) and entry.get("failed") is True)
    detail = {"items": len(found), "failed_items": failures or None}
    if expansion.reduce is None:
        return context.succeeded(found, detail)
    key = step_id(run.info.id, expansion.reduce)
    reduced = run.knowledge.checkpoints([key]).get(key)
    check([reduced])
    return context.succeeded(result(reduced), detail)


def _check_enough(run: Run, node: Node, expansion: Expansion) -> None:
    """Raise ChildFailed if too many items of the map have failed."""
    items = children(run, expansion)[: len(expansion.items)]
    failed = [item for item in items if item is None or item.status in (StepStatus.FAILED, StepStatus.CANCELLED)]
    if not failed:
        return
    # If one item failed and the others were cancelled because of it, report the one that failed.
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
