"""`aggregate:` — combines results without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome
from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import Env, render_value, to_text
from gorgon_common.workflow.plan import Node


class Aggregate(StepHandler):
    """Combines the values of `from:` as `how:` specifies."""

    kind: ClassVar[str] = "aggregate"

    def execute(self, context: StepContext) -> Outcome:
        """Return the combined value.  Raises ExpressionError, Malformed."""
        joined = aggregate(context.node, context.env())
        schema = context.node.spec.get("schema")
        return context.succeeded(joined if schema is None else context.fitting(schema, joined))


def aggregate(node: Node, env: Env) -> Any:
    """Return the value of an `aggregate:` step.  Raises ExpressionError."""
    source = node.spec.get("from", [])
    value = render_value(source, env, legacy=env.lenient)
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    match node.spec.get("how", "concat"):
        case "concat":
            return "\n\n".join(to_text(part) for part in parts)
        case "json":
            return parts
        case "first":
            return next((part for part in parts if part not in (None, "", [], {})), None)
        case "vote":
            return _vote(parts)
        case "merge":
            return _merge(node, parts)
    raise ExpressionError(f"`how: {node.spec.get('how')}` of `{node.name}` is not known.")


def _vote(parts: list[Any]) -> Any:
    """Return the most frequent value; the first one in case of a tie."""
    counts: dict[str, int] = {}
    for part in parts:
        key = json.dumps(part, sort_keys=True, default=str)
        counts[key] = counts.get(key, 0) + 1
    return json.loads(max(counts, key=lambda key: counts[key])) if counts else None


def _merge(node: Node, parts: list[Any]) -> Any:
    if all(isinstance(part, Mapping) for part in parts):
        merged: dict[str, Any] = {}
        for part in parts:
            merged.update(part)
        return merged
    if all(isinstance(part, (list, tuple)) for part in parts):
        return [entry for part in parts for entry in part]
    raise ExpressionError(f"`how: merge` of `{node.name}` needs objects only, or lists only.")
