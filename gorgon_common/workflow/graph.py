"""Renders a Plan: as a tree for the terminal, as a Mermaid flowchart, or as nodes and edges in JSON.

The engine's own nodes are omitted; the output shows only what the author wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from gorgon_common.workflow.plan import COMPOSITE, Kind, Node, Plan

_OWN = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})

_BODY_WORDS = {
    "item": "for each item",
    "reduce": "then",
    "body": "again",
    "fallback": "if it fails",
}
"""Role of a body → its label; the steps of a group need none."""

_SHAPES = {
    Kind.AGENT: ("([", "])"),
    Kind.COMMAND: ("[/", "/]"),
    Kind.APPROVAL: ("{{", "}}"),
    Kind.WAIT: ("{{", "}}"),
    Kind.CHECKPOINT: (">", "]"),
}


def levels(plan: Plan, indices: Iterable[int] | None = None) -> list[list[int]]:
    """Return the nodes in layers; each node is one layer below the last of its dependencies.

    `indices` are siblings; by default the top-level steps, without the engine's own nodes.
    """
    members = [
        index for index in (range(plan.top) if indices is None else indices) if plan.nodes[index].kind not in _OWN
    ]
    known = set(members)
    depth: dict[int, int] = {}
    waiting = {index: sum(dep.node in known for dep in plan.nodes[index].deps) for index in members}
    followers: dict[int, list[int]] = {}
    for index in members:
        for dep in plan.nodes[index].deps:
            if dep.node in known:
                followers.setdefault(dep.node, []).append(index)
    ready = [index for index in members if waiting[index] == 0]
    for index in ready:
        depth.setdefault(index, 0)
        for after in followers.get(index, ()):
            depth[after] = max(depth.get(after, 0), depth[index] + 1)
            waiting[after] -= 1
            if waiting[after] == 0:
                ready.append(after)
    made: list[list[int]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for index in members:
        made[depth[index]].append(index)
    return made


def to_text(plan: Plan) -> str:
    """Return the plan for people: numbered layers, and for each step what it does and what it waits for."""
    lines = [plan.name + (f" {plan.version}" if plan.version else "")]
    sections = {"main": "", "on_error": "on error", "finally": "finally"}
    for phase, title in sections.items():
        members = [index for index in range(plan.top) if plan.nodes[index].phase == phase]
        layers = levels(plan, members)
        if not layers:
            continue
        if title:
            lines.append(f"{title}:")
        lines.extend(_layers(plan, layers, "  "))
    if any(dep.order and plan.nodes[dep.node].kind not in _OWN for node in plan.nodes for dep in node.deps):
        lines.append("* waits for it, however it ends")
    return "\n".join(lines)


def _layers(plan: Plan, layers: list[list[int]], indent: str) -> Iterator[str]:
    for number, layer in enumerate(layers, 1):
        for position, index in enumerate(layer):
            mark = f"{number}." if position == 0 else " " * len(f"{number}.")
            yield f"{indent}{mark} {_line(plan, plan.nodes[index])}"
            yield from _bodies(plan, plan.nodes[index], indent + " " * (len(mark) + 1))


def _line(plan: Plan, node: Node) -> str:
    before = [_wait(plan, dep.node, order=dep.order) for dep in node.deps if plan.nodes[dep.node].kind not in _OWN]
    after = f"  ← {', '.join(before)}" if before else ""
    join = f" ({node.join.replace('_', ' ')})" if before and node.join not in ("all_success", "none_failed") else ""
    when = f"  if {condition_text(node.condition)}" if node.condition is not None else ""
    return f"{node.id}  {describe(node)}{after}{join}{when}"


def _wait(plan: Plan, index: int, *, order: bool) -> str:
    return plan.nodes[index].id + ("*" if order else "")


def _bodies(plan: Plan, node: Node, indent: str) -> Iterator[str]:
    for role, body in node.bodies.items():
        word = _BODY_WORDS.get(role)
        if word is None:
            yield from _layers(plan, levels(plan, body), indent)
            continue
        for index in body:
            inner = plan.nodes[index]
            when = f"  if {condition_text(inner.condition)}" if inner.condition is not None else ""
            yield f"{indent}{word}: {describe(inner)}{when}"
            yield from _bodies(plan, inner, indent + "  ")


def describe(node: Node) -> str:
    """Return a short description of a node: "planner (anthropic)", "$ pytest -q", "each of {{plan.tasks}}"."""
    spec = node.spec
    match node.kind:
        case Kind.AGENT:
            model = (spec.get("models") or [spec["provider"]])[0]
            return f"{spec.get('role') or 'agent'} ({model})"
        case Kind.COMMAND:
            return "$ " + _short(" ".join(spec["argv"]) if "argv" in spec else spec["shell"])
        case Kind.ACTION:
            return str(spec["uses"])
        case Kind.WORKFLOW:
            return f"workflow {spec['workflow']}"
        case Kind.APPROVAL:
            return f"approval: {_short(spec['message'])}"
        case Kind.MAP:
            over = spec["over"] if isinstance(spec["over"], str) else f"{len(spec['over'])} items"
            most = f", {spec['max_parallel']} at a time" if spec.get("max_parallel") else ""
            return f"map {spec['as']} of {_short(over)}{most}"
        case Kind.LOOP:
            return f"loop until {condition_text(spec['until'])}, at most {spec['max']} times"
        case Kind.AGGREGATE:
            return f"aggregate ({spec['how']})"
        case Kind.WAIT:
            return f"wait {_short(_waited(spec))}"
        case Kind.GROUP:
            return "group"
    return str(node.kind)


def _waited(spec: Any) -> str:
    if "for" in spec:
        return f"{spec['for']:g} s"
    return f"until {spec['until']}" if "until" in spec else f"for {spec.get('event')}"


_SIGNS = {
    "equals": "==",
    "not_equals": "!=",
    "greater_than": ">",
    "less_than": "<",
    "greater_or_equal": ">=",
    "less_or_equal": "<=",
}


def condition_text(condition: Any) -> str:
    """Return a condition on one line, whichever form it has."""
    if isinstance(condition, str):
        return _short(condition)
    for key, sign in (("all", " && "), ("any", " || ")):
        if key in condition:
            return "(" + sign.join(condition_text(part) for part in condition[key]) + ")"
    if "not" in condition:
        return f"!({condition_text(condition['not'])})"
    operator = str(condition["operator"])
    sign = _SIGNS.get(operator, operator.replace("_", " "))
    if "value" not in condition:
        return f"{condition['field']} {sign}"
    return _short(f"{condition['field']} {sign} {json.dumps(condition['value'], ensure_ascii=False)}")


def _short(text: Any, most: int = 60) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def to_mermaid(plan: Plan) -> str:
    """Return a Mermaid flowchart: composites are subgraphs, order edges are dotted, conditions appear on the nodes."""
    lines = ["flowchart TD"]
    main = [i for i in range(plan.top) if plan.nodes[i].phase == "main" and plan.nodes[i].kind not in _OWN]
    lines.extend(_boxes(plan, main, "  "))
    for phase, title in (("on_error", "on error"), ("finally", "finally")):
        members = [index for index in range(plan.top) if plan.nodes[index].phase == phase]
        if members:
            lines.append(f'  subgraph {phase}["{title}"]')
            lines.extend(_boxes(plan, members, "    "))
            lines.append("  end")
    for index, node in enumerate(plan.nodes):
        for dep in node.deps:
            if node.kind not in _OWN and plan.nodes[dep.node].kind not in _OWN:
                lines.append(f"  n{dep.node} {'-.->' if dep.order else '-->'} n{index}")
    return "\n".join(lines)


def _boxes(plan: Plan, indices: Iterable[int], indent: str) -> Iterator[str]:
    for index in indices:
        node = plan.nodes[index]
        label = _label(node)
        if node.bodies:
            yield f'{indent}subgraph n{index}["{label}"]'
            if node.kind not in COMPOSITE:
                yield f'{indent}  n{index}a["{_escape(describe(node))}"]'
            for body in node.bodies.values():
                yield from _boxes(plan, body, indent + "  ")
            yield f"{indent}end"
        else:
            opening, closing = _SHAPES.get(node.kind, ("[", "]"))
            yield f'{indent}n{index}{opening}"{label}"{closing}'


def _label(node: Node) -> str:
    when = f"<br/>if {_escape(condition_text(node.condition))}" if node.condition is not None else ""
    return f"{_escape(node.id)}<br/>{_escape(describe(node))}{when}"


def _escape(text: str) -> str:
    """Escape a label: Mermaid reads entities written with `#`, and quotes and brackets would end the label."""
    for char, code in (("#", "#35;"), ("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        text = text.replace(char, code)
    return text


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as nodes and edges.

    The shape is `{name, nodes: [{index, id, kind, title, queue, phase, container, body, level, condition}], edges:
    [{from, to, order}]}`.  `from` and `to` are node indices; `body` is the node's role in its container.
    """
    level: dict[int, int] = {}
    bodies: dict[int, str] = {}
    siblings: list[Iterable[int]] = [
        [index for index in range(plan.top) if plan.nodes[index].phase == phase]
        for phase in ("main", "on_error", "finally")
    ]
    for node in plan.nodes:
        for role, body in node.bodies.items():
            siblings.append(body)
            bodies.update(dict.fromkeys(body, role))
    for members in siblings:
        for number, layer in enumerate(levels(plan, members)):
            level.update(dict.fromkeys(layer, number))
    nodes = [
        {
            "index": index,
            "id": node.id,
            "kind": str(node.kind),
            "title": describe(node),
            "queue": node.queue,
            "phase": node.phase,
            "container": node.container,
            "body": bodies.get(index),
            "level": level[index],
            "condition": None if node.condition is None else condition_text(node.condition),
        }
        for index, node in enumerate(plan.nodes)
        if node.kind not in _OWN
    ]
    edges = [
        {"from": dep.node, "to": index, "order": dep.order}
        for index, node in enumerate(plan.nodes)
        for dep in node.deps
        if node.kind not in _OWN and plan.nodes[dep.node].kind not in _OWN
    ]
    return {"name": plan.name, "nodes": nodes, "edges": edges}
