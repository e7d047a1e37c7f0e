"""How a Plan is shown to people and machines: the same for `gorgon graph --json` and `POST /v1/workflows/plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gorgon_common.errors import Problem
from gorgon_common.workflow.plan import Kind, Node, Plan

ENGINE_KINDS = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
"""The engine's own joins: no step of anybody's file."""


def plan_view(plan: Plan, warnings: Sequence[Problem] = ()) -> dict[str, Any]:
    """Return the compiled workflow in the shape of `schemas.PlanView`."""
    return {
        "workflow": plan.name,
        "hash": plan.hash(),
        "inputs": {name: dict(schema) for name, schema in plan.inputs.items()},
        "outputs": list(plan.outputs),
        "nodes": plan_nodes(plan),
        "problems": [problem.to_dict() for problem in warnings],
        "unavailable": list(plan.unavailable),
    }


def plan_nodes(plan: Plan) -> list[dict[str, Any]]:
    """Return the steps as `{id, kind, queue, role, needs, parent, phase}`, the templates of composites included."""
    return [_node(plan, node) for node in plan.nodes if node.kind not in ENGINE_KINDS]


def _node(plan: Plan, node: Node) -> dict[str, Any]:
    needs = [plan.nodes[dep.node] for dep in node.deps]
    return {
        "id": node.id,
        "kind": node.kind.value,
        "queue": node.queue,
        "role": node.spec.get("role"),
        "needs": [need.id for need in needs if need.kind not in ENGINE_KINDS],
        "parent": None if node.container is None else plan.nodes[node.container].id,
        "phase": node.phase,
    }
