"""The JSON form of plans and budgets, the same on the command line (`--json`) and over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.errors import Problem
from gorgon_common.workflow.plan import Kind, Node, Plan

ENGINE_KINDS = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
"""Joins added by the engine, which are not steps of the file."""


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


MICRO = 1_000_000
_AMOUNTS = ("usd_limit", "usd_spent", "usd_reserved", "usd_overrun")


def budget_document(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a budget from `Session.list_budgets` in its JSON form, with dollars instead of micro-dollars."""
    return _converted(entry, lambda micro: micro / MICRO)


def read_budget(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the budget from which `budget_document` was made."""
    return _converted(document, lambda usd: round(usd * MICRO))


def _converted(entry: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in entry.items():
        if name == "accounts":
            made[name] = [_converted(account, convert) for account in value]
        elif name in _AMOUNTS:
            made[name] = None if value is None else convert(value)
        else:
            made[name] = value
    return made
