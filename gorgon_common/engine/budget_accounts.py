"""The accounts for the limits in a run's file."""

from __future__ import annotations

from typing import Any

from gorgon_common.costs.budgets import LEVELS, Account, micro_dollars
from gorgon_common.engine.context import Run, readable_path
from gorgon_common.engine.records import Claimed
from gorgon_common.workflow.plan import Kind, Node


def own_accounts(run: Run, step: Claimed) -> list[Account]:
    """Return the accounts for the limits in a run's file: the run's own, the step's, and those of its composites.

    They belong to the first run in a chain of resumed runs, so money spent before a resume remains spent.
    """
    found: list[Account] = []
    limits = run.plan.limits
    if limits.get("budget_usd") is not None or limits.get("tokens") is not None:
        found.append(
            Account(
                f"run:{run.info.root}",
                LEVELS["run"],
                "the limit of the run",
                _usd(limits.get("budget_usd")),
                limits.get("tokens"),
            )
        )
    chain = run.ancestry(step)
    if not any(_capped(run.plan.nodes[number]) for _, number, _ in chain):
        return found
    path = run.path(step)
    for depth, (_, number, _) in enumerate(chain):
        node = run.plan.nodes[number]
        if _is_body(node):
            path = path.rpartition("[" if node.id.endswith("[]") else "#")[0]
        found += caps(run, node, path, len(chain) - depth)
        if not _is_body(node):
            path = path.rpartition("/")[0]
    return found


def caps(run: Run, node: Node, path: str, depth: int) -> list[Account]:
    """Return the account for the limit of one node, if it has one; `depth` counts from the outermost."""
    if not _capped(node):
        return []
    return [
        Account(
            f"step:{run.info.root}:{path}",
            LEVELS["step"] + depth,
            f"the limit of step {readable_path(path)}",
            _usd(node.spec.get("budget_usd")),
            node.spec.get("tokens"),
        )
    ]


def _capped(node: Node) -> bool:
    return node.spec.get("budget_usd") is not None or node.spec.get("tokens") is not None


def _is_body(node: Node) -> bool:
    """Tell whether a node is the body that a map or a loop repeats; all of its rounds share the step's limit."""
    return node.id.endswith(("[]", "#"))


def agents(run: Run, number: int) -> list[Node]:
    """Return the agent steps of a body; a loop's steps are repeated for its maximum number of rounds."""
    node = run.plan.nodes[number]
    found = [node] if node.kind is Kind.AGENT else []
    for role, body in node.bodies.items():
        if role != "fallback":
            times = int(node.spec.get("max") or 1) if node.kind is Kind.LOOP else 1
            found += [agent for inner in body for agent in agents(run, inner)] * times
    return found


def _usd(value: Any) -> int | None:
    return None if value is None else micro_dollars(value)
