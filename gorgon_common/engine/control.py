"""User operations on runs: cancel and resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from gorgon_common.engine.context import Run, RunCache
from gorgon_common.engine.kinds.wait import MAX_NAME
from gorgon_common.engine.ports import DispatchStore
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import ReadyStep
from gorgon_common.engine.submit import Creates, submit
from gorgon_common.errors import Conflict, InputInvalid
from gorgon_common.workflow.plan import Node, Plan


class Continues(Creates, DispatchStore, Protocol):
    """The store as a resume uses it."""

    def finished(self, run: int) -> tuple[bool, list[tuple[int, int]]]:
        """Return whether a run has ended, and (row, node) of its paid steps that succeeded."""
        ...

    def send_event(self, run: int, name: str, data: Any) -> list[ReadyStep]:
        """Send an event to a run; return the steps that waited for it."""
        ...


def cancel(store: Continues, publisher: Publisher, run: Run) -> None:
    """Ask a run to stop: only its final steps may still start, and calls in flight are aborted.  Raises Conflict.

    A run whose process has died ends at once, since nothing is left to run its steps.  A run that waits for its
    concurrency key also ends at once, since none of its steps has started.
    """
    if store.close_orphan(run.info.id, cancelled=True):
        return
    heads = store.stop(run.info.id, gate=run.gate, keeps=run.keeps, error=None, reason="the run was cancelled")
    publisher.publish(heads)


def send_event(store: Continues, publisher: Publisher, run: Run, name: str, data: Any) -> None:
    """Send an event to a run: the oldest event of a name lets one step that waits for it go on, now or later.

    Raises InputInvalid where the name cannot be one, Conflict where the run has ended.
    """
    if not name.strip() or len(name) > MAX_NAME:
        raise InputInvalid(f"The name of an event has 1 to {MAX_NAME} characters.")
    publisher.publish(store.send_event(run.info.id, name, data))


def resume(
    store: Continues,
    knowledge: RunCache,
    before: Run,
    plan: Plan,
    *,
    publisher: Publisher,
    public_id: str,
    now: datetime,
    home: str,
    grouped: frozenset[int],
    trace_id: str | None = None,
) -> tuple[int, int, int]:
    """Continue a run as a new one; steps with an unchanged fingerprint are adopted when they become ready.

    Returns (run, number of steps expected to be reused, number of steps left to run).  Raises Conflict if the run has
    not ended.
    """
    ended, paid = store.finished(before.info.id)
    if not ended and not store.close_orphan(before.info.id):
        raise Conflict("The run has not ended yet.", hint="Cancel it first, or wait: gorgon runs watch.")
    same = _unchanged(before.plan, plan)
    reused = sum(1 for _, node in paid if before.plan.nodes[node].id in same)
    left = work(plan) - len({before.plan.nodes[node].id for _, node in paid if before.plan.nodes[node].id in same})
    number, _ = submit(
        plan,
        before.info.inputs,
        store=store,
        knowledge=knowledge,
        publisher=publisher,
        grouped=grouped,
        public_id=public_id,
        now=now,
        target=before.info.target,
        home=home,
        org=before.info.org,
        team=before.info.team,
        root=before.info.root,
        resumed_from=before.info.id,
        trace_id=trace_id,
    )
    return number, reused, max(0, left)


def work(plan: Plan) -> int:
    """Return the number of steps that need a worker.  The body of a map or loop counts once, a fallback not at all."""
    spare = {index for node in plan.nodes for index in node.bodies.get("fallback", ())}
    return sum(node.queue is not None and index not in spare for index, node in enumerate(plan.nodes))


def _unchanged(before: Plan, after: Plan) -> set[str]:
    """Return the ids of nodes that, like their dependencies, mean the same in both plans."""
    old = {node.id: node for node in before.nodes}
    same: set[str] = set()

    def equal(node: Node, other: Node | None) -> bool:
        return other is not None and _meaning(node) == _meaning(other)

    nodes: Sequence[Node] = after.nodes
    for node in nodes:
        if equal(node, old.get(node.id)) and all(
            nodes[dep.node].id in same or dep.node > nodes.index(node) for dep in node.deps
        ):
            same.add(node.id)
    return same


def _meaning(node: Node) -> str:
    spec: Any = dict(node.spec)
    return json.dumps([node.kind, spec, str(node.condition)], sort_keys=True, default=str)
