"""The measured shapes, as dependency lists (step → the steps before it) and as plans of no-op steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gorgon_common import queues
from gorgon_common.workflow.plan import Dep, Join, Kind, Node, Plan

Deps = list[list[int]]


def chain(steps: int) -> Deps:
    """Return a chain: one step after the other."""
    return [[index - 1] if index else [] for index in range(steps)]


def fan_out(steps: int) -> Deps:
    """Return a fan-out: one step, then all others in parallel, then one."""
    return [[]] + [[0] for _ in range(steps - 2)] + [list(range(1, steps - 1))]


def fan_in(steps: int) -> Deps:
    """Return a fan-in: all but one in parallel, then that one, like a map and its reduce without expansion."""
    return [[] for _ in range(steps - 1)] + [list(range(steps - 1))]


def dag(steps: int, seed: int = 7) -> Deps:
    """Return layers of about 20 steps; each depends on one to three of the previous layer, some also on an earlier
    layer.
    """
    chance = random.Random(seed)
    deps: Deps = []
    layers: list[list[int]] = []
    while len(deps) < steps:
        width = min(steps - len(deps), max(1, int(chance.uniform(0.5, 1.5) * 20)))
        layer = list(range(len(deps), len(deps) + width))
        for _ in layer:
            before: set[int] = set()
            if layers:
                before = set(chance.sample(layers[-1], min(len(layers[-1]), chance.randint(1, 3))))
                if len(layers) > 1 and chance.random() < 0.3:
                    before.add(chance.choice(layers[chance.randrange(len(layers) - 1)]))
            deps.append(sorted(before))
        layers.append(layer)
    return deps


def lone(steps: int) -> Deps:
    """Return independent steps."""
    return [[] for _ in range(steps)]


def plan(
    deps: Deps,
    name: str = "bench",
    *,
    milliseconds: Sequence[int] = (0,),
    on: Sequence[str] = (queues.CONTROL,),
) -> Plan:
    """Return a plan of queued no-op steps, which cycle through the queues `on` and the durations `milliseconds`."""
    nodes = [
        Node(
            id=f"s{index}",
            kind=Kind.NOOP,
            queue=on[index % len(on)],
            deps=tuple(Dep(before) for before in found),
            spec={"milliseconds": taken} if (taken := milliseconds[index % len(milliseconds)]) else {},
        )
        for index, found in enumerate(deps)
    ]
    return Plan(name=name, nodes=(*nodes, *_ends(nodes)), top=len(nodes) + 3)


def map_reduce(steps: int) -> Plan:
    """Return a plan whose one step expands into `steps - 1` no-op items and a no-op reduce."""
    items = steps - 1
    over = list(range(items))
    mapped = Node(
        id="each",
        kind=Kind.MAP,
        spec={"over": over, "as": "item", "max_items": items, "on_item_failure": "fail"},
        bodies={"item": (4,), "reduce": (5,)},
    )
    children = (
        Node(id="each[]", kind=Kind.NOOP, queue=queues.CONTROL, container=0),
        Node(id="each.reduce", kind=Kind.NOOP, queue=queues.CONTROL, container=0),
    )
    return Plan(name="bench-map", nodes=(mapped, *_ends([mapped]), *children), top=4)


def critical_path(deps: Deps, milliseconds: Sequence[int]) -> int:
    """Return the minimum duration of a graph in milliseconds."""
    ends: list[int] = []
    for taken, before in zip(milliseconds, deps, strict=True):
        ends.append(taken + max((ends[one] for one in before), default=0))
    return max(ends)


def _ends(nodes: Sequence[Node]) -> tuple[Node, ...]:
    followed = {dep.node for node in nodes for dep in node.deps}
    sinks = tuple(Dep(index) for index in range(len(nodes)) if index not in followed)
    first = len(nodes)
    return (
        Node(id="$gate", kind=Kind.GATE, deps=sinks, join=Join.ALL_DONE),
        Node(id="$finally", kind=Kind.FINALLY, deps=(Dep(first),), join=Join.ALL_DONE),
        Node(id="$end", kind=Kind.END, deps=(Dep(first + 1),), join=Join.ALL_DONE),
    )
