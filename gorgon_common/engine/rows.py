"""Builds the rows of a run from the nodes of a plan."""

from __future__ import annotations

from collections.abc import Container, Sequence

from gorgon_common import queues
from gorgon_common.engine.records import Row, Weight
from gorgon_common.workflow.plan import INLINE, Join, Kind, Node, Plan

QUEUE_NUMBERS = {name: number for number, name in enumerate(queues.ALL)}
"""Queue name → the number stored in rows.  `queues.ALL` is append-only."""
CONTROL = QUEUE_NUMBERS[queues.CONTROL]


def weight(node: Node) -> Weight:
    """Return a node's weight.  A conditional step is inline: whether it runs is decided when it becomes ready."""
    if node.kind in INLINE or node.condition is not None or node.join is not Join.ALL_SUCCESS or node.phase != "main":
        return Weight.INLINE
    return Weight.FAST if node.kind is Kind.NOOP and not node.spec.get("milliseconds") else Weight.SLOW


def queue(node: Node) -> int:
    """Return the number of a node's queue; `control` for inline kinds, in case they have to be sent."""
    return QUEUE_NUMBERS[node.queue] if node.queue is not None else CONTROL


def top_rows(plan: Plan, successors: Sequence[Sequence[int]], grouped: Container[int]) -> list[Row]:
    """Return the rows of a new run: one per top-level node, row number = node number."""
    return [
        Row(
            row=index,
            node=index,
            deps_left=len({dep.node for dep in node.deps}),
            successors=successors[index],
            weight=weight(node),
            queue=queue(node),
            grouped=index in grouped,
        )
        for index, node in enumerate(plan.nodes[: plan.top])
    ]


def body_rows(plan: Plan, successors: Sequence[Sequence[int]], body: Sequence[int], *, parent: int) -> list[Row]:
    """Return the rows of a group's body, numbered from 0, each with the edges inside the body."""
    place = {number: index for index, number in enumerate(body)}
    return [
        Row(
            row=index,
            node=number,
            deps_left=len({dep.node for dep in plan.nodes[number].deps if dep.node in place}),
            successors=[place[successor] for successor in successors[number] if successor in place],
            weight=weight(plan.nodes[number]),
            queue=queue(plan.nodes[number]),
            parent=parent,
        )
        for index, number in enumerate(body)
    ]


def child_row(plan: Plan, number: int, *, row: int, parent: int, position: int | None, **fields: object) -> Row:
    """Return one child of a composite."""
    node = plan.nodes[number]
    values: dict[str, object] = {"deps_left": 0, "successors": (), **fields}
    return Row(
        row=row,
        node=number,
        weight=weight(node),
        queue=queue(node),
        parent=parent,
        position=position,
        **values,  # type: ignore[arg-type]
    )
